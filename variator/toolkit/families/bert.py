"""BERT and what shares its architecture: MiniLM, BGE, E5, GTE (v1) and most sentence-transformers."""

from variator.toolkit.families.base import Classifier, Family

EMBEDDINGS = {
    "token.weight": "embeddings.word_embeddings.weight",
    "position.weight": "embeddings.position_embeddings.weight",
    "token_type.weight": "embeddings.token_type_embeddings.weight",
    "norm.weight": "embeddings.LayerNorm.weight",
    "norm.bias": "embeddings.LayerNorm.bias",
}
LAYER = {
    "attention.query": "encoder.layer.{layer}.attention.self.query",
    "attention.key": "encoder.layer.{layer}.attention.self.key",
    "attention.value": "encoder.layer.{layer}.attention.self.value",
    "attention.output": "encoder.layer.{layer}.attention.output.dense",
    "attention_norm": "encoder.layer.{layer}.attention.output.LayerNorm",
    "ffn.inner": "encoder.layer.{layer}.intermediate.dense",
    "ffn.outer": "encoder.layer.{layer}.output.dense",
    "ffn_norm": "encoder.layer.{layer}.output.LayerNorm",
}

FAMILY = Family(
    name="bert",
    model_types=("bert",),
    embeddings=EMBEDDINGS,
    layer=LAYER,
    classifier=Classifier(dense="pooler.dense", activation="tanh", output="classifier"),
)

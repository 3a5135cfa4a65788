"""DistilBERT: BERT without token types, with names of its own."""

from variator.toolkit.families.base import Classifier, Family

FAMILY = Family(
    name="distilbert",
    model_types=("distilbert",),
    embeddings={
        "token.weight": "embeddings.word_embeddings.weight",
        "position.weight": "embeddings.position_embeddings.weight",
        "norm.weight": "embeddings.LayerNorm.weight",
        "norm.bias": "embeddings.LayerNorm.bias",
    },
    layer={
        "attention.query": "transformer.layer.{layer}.attention.q_lin",
        "attention.key": "transformer.layer.{layer}.attention.k_lin",
        "attention.value": "transformer.layer.{layer}.attention.v_lin",
        "attention.output": "transformer.layer.{layer}.attention.out_lin",
        "attention_norm": "transformer.layer.{layer}.sa_layer_norm",
        "ffn.inner": "transformer.layer.{layer}.ffn.lin1",
        "ffn.outer": "transformer.layer.{layer}.ffn.lin2",
        "ffn_norm": "transformer.layer.{layer}.output_layer_norm",
    },
    classifier=Classifier(dense="pre_classifier", activation="relu", output="classifier"),
    settings={"hidden_act": "activation", "intermediate_size": "hidden_dim"},
)

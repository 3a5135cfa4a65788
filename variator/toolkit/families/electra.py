"""ELECTRA (the discriminator): BERT's tensors, with a projection where the embeddings are narrower."""

from variator.toolkit.families.base import Classifier, Family
from variator.toolkit.families.bert import EMBEDDINGS, LAYER

FAMILY = Family(
    name="electra",
    model_types=("electra",),
    embeddings={**EMBEDDINGS, "project": "embeddings_project"},
    layer=LAYER,
    classifier=Classifier(dense="classifier.dense", activation="gelu", output="classifier.out_proj"),
)

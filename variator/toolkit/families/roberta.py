"""RoBERTa and XLM-R: BERT's tensors, positions counted from the padding id + 1."""

from variator.toolkit.families.base import Classifier, Family
from variator.toolkit.families.bert import EMBEDDINGS, LAYER

FAMILY = Family(
    name="roberta",
    model_types=("roberta", "xlm-roberta", "camembert"),
    embeddings=EMBEDDINGS,
    layer=LAYER,
    classifier=Classifier(dense="classifier.dense", activation="tanh", output="classifier.out_proj"),
    unused_positions=lambda config: config.pad_token_id + 1,
)

"""An encoder with a classification head: the model of SiDA-MoE's tables 4 and 5, which transformers does not have for Switch.

Checkpoint format: `architectures: [SwitchTransformersForSequenceClassification]` in config.json, the encoder's tensors under
transformers' names (`shared.weight`, `encoder.*`) and `classifier.weight` (labels, d_model) with `classifier.bias` (labels,).
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import SwitchTransformersConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersPreTrainedModel,
    SwitchTransformersStack,
)


class SwitchTransformersForSequenceClassification(SwitchTransformersPreTrainedModel):
    """Mean of the encoder's outputs over real tokens, then a linear layer. Padding has no part in the mean."""

    _tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: SwitchTransformersConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        encoder_config = copy.deepcopy(config)
        encoder_config.use_cache = False
        encoder_config.is_encoder_decoder = False
        self.encoder = SwitchTransformersStack(encoder_config)
        self.classifier = nn.Linear(config.d_model, config.num_labels or 2)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        """
        Args:
            input_ids, attention_mask: int64 (batch, tokens).

        Returns:
            logits: (batch, labels).
        """
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return SequenceClassifierOutput(logits=self.classifier(pooled))

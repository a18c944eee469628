"""A draft model outside of an ensemble: it proposes and does not influence the output."""

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm.ensemble_decode.members import load_beside
from vllm.ensemble_decode.model import MemberGroup
from vllm.ensemble_decode.vocabulary import fitted, member_vocabularies

NAME = "draft_model"


class OutsideSpeculator(StandaloneARSpeculator):
    """vLLM's speculator. It loads the draft model like a member, with the model's own
    configuration.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, members: list[ModelConfig]
    ) -> None:
        super().__init__(vllm_config, device)
        self.members = members

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        # vLLM does not pass this on, and some models ask for a tokenizer as they load.
        skips = self.vllm_config.model_config.skip_tokenizer_init
        self.draft_model_config.skip_tokenizer_init = skips
        if self.draft_model_config.multimodal_config is not None:
            self.draft_model_config.multimodal_config.language_model_only = True
        draft = load_beside(
            self.vllm_config, self.draft_model_config, NAME, {"member": NAME}, self.members
        )
        models = [self.members[0], self.draft_model_config]
        vocabulary = member_vocabularies(models, union_needed=False)[1]
        # The group passes all arguments that vLLM passes to models. The speculator passes fewer.
        return MemberGroup(members=[fitted(draft, vocabulary, self.device)])

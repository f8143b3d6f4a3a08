"""A model's tokenizer: from its files, or trained on the rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmft.config.model import ModelConfig
from llmft.config.untrusted import check_model
from llmft.core.errors import ConfigError, first_line
from llmft.data.hub import PACKAGED, Located, locate


def load_tokenizer(model: ModelConfig, located: Located) -> Any:
    """The model's fast tokenizer, with a padding token.

    Padding is masked and never a label here, so which token pads changes nothing; it is the tokenizer's own,
    else the unknown token, else the end token, and no embedding is added.
    """
    from transformers import AutoTokenizer

    directory = located.directory
    if directory is None:
        directory = locate(replace(model, path=PACKAGED + "tiny")).directory
    assert directory is not None
    check_model(directory)
    trust = model.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust)
    except Exception as error:
        raise ConfigError(
            f"model={model.name}: its tokenizer in {directory} cannot be loaded ({first_line(error)})."
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(f"model={model.name}: its tokenizer has no fast form (tokenizer.json), which is needed.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def train_tokenizer(texts: list[str], vocab_size: int, context_tokens: int) -> Any:
    """A byte-level BPE tokenizer of `vocab_size` tokens trained on `texts`, with <pad>, <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )

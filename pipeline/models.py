"""Models and tokenizers: made, loaded with their heads, given adapters, saved so that any directory loads anywhere.

A reward model and a critic are one kind of thing: transformers' sequence classifier with one label, whose head is read
at the last token (score) or before every response token (values). The constant that gives the SFT policy mean score 0
is `config.score_shift`; scoring subtracts it and a critic made from the reward model starts from it, so that before
training the critic predicts just what the reward model would pay.
"""

import copy
import importlib.util
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pipeline import fingerprints
from pipeline.config import Adapter, Pretrain, UserError
from pipeline.process import processes, say
from pipeline.roles import (
    POLICY,
    PREFIX,
    REFERENCE,
    REWARD,
    AdapterConfig,
    adapter_layers,
    add_role,
    base_weights,
    config_of,
    fill,
    for_language_model,
    in_the_same_role,
    kind,
    role,
    taken_off,
    trunk_fingerprint,
    without_adapter,
)
from pipeline.tensors import logits_without, logprobs_and_entropy, position_ids

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"

Policy = PreTrainedModel | PeftModel
Model = TypeVar("Model", bound=nn.Module)

ATTENTION = None if torch.accelerator.is_available() else "eager"
"""Attention kernel: transformers' own choice on an accelerator. On CPUs the plain one is the faster at the lengths of
preference data (docs/log.md); it keeps T x T numbers per head and layer."""


MOST_LOGITS = 2**24
"""How many are made into log-probabilities at a time, 64 MiB in fp32: that takes several copies of them, and with a
vocabulary of 50,000 more memory than the model. Of more, the parts are computed again in the backward pass."""


class ModelError(UserError):
    """A model or tokenizer directory that cannot be used as asked; the message says what was expected."""


# tokenizers


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with distinct pad, bos and eos, trained on texts: byte-level BPE, characters or words.

    It opens every text with bos; closing one with eos is `pipeline.data`'s. Byte-level BPE (Radford et al. 2019) knows
    every text; `char` and `word` map what they have not seen to <unk>.
    """
    special = [PAD, BOS, EOS]
    if kind == "bpe":
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(WordLevel(unk_token=UNKNOWN))
        # One piece per character, or a word with the space before it: joined without glue, both give the text back.
        piece = Regex(r"[\s\S]") if kind == "char" else Regex(r"\s?\S+|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(piece, behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(
            vocab_size=vocab_size, special_tokens=[*special, UNKNOWN], show_progress=False
        )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    unknown = {} if kind == "bpe" else {"unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left", **unknown
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id, with a padding token that is not EOS.

    Where there is none, an existing special token that text never holds is taken: embeddings are never resized, and
    masks are made from lengths, so its name does not matter. ModelError without EOS, or without such a token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: no tokenizer can be loaded from it: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: its tokenizer has no EOS token, so a response could never end; set eos_token in it")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = spare_tokens(tokenizer)
        if not spare:
            raise ModelError(f"{path}: its tokenizer has no special token to spare for padding; set pad_token in it")
        tokenizer.pad_token = spare[0]
        say(f"{path}: its tokenizer has no padding token of its own: '{spare[0]}' is taken")
    return tokenizer


def spare_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that neither text nor chat template uses: named for padding first, then reserved, then unknown."""
    used = {tokenizer.eos_token, tokenizer.bos_token}
    if tokenizer.unk_token_id in tokenizer("\u0378 \U0001f9ff")["input_ids"]:
        used.add(tokenizer.unk_token)
    template = str(tokenizer.chat_template or "")
    names = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content not in used and token.content not in template
    ]
    likely = ("pad", "reserved", "unused", "unk")
    return sorted(names, key=lambda name: min((i for i, part in enumerate(likely) if part in name.lower()), default=9))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells its token ids from another's: every entry of the vocabulary, and the special ids."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return fingerprints.of_value([sorted(tokenizer.get_vocab().items()), special])[:12]


def same_tokenizer(paths: Mapping[str, str | Path]) -> PreTrainedTokenizerBase:
    """The tokenizer that all the models share: the first one's. ModelError if another gives other ids to a text."""
    tokenizers = {name: load_tokenizer(path) for name, path in paths.items()}
    prints = {name: tokenizer_fingerprint(tokenizer) for name, tokenizer in tokenizers.items()}
    if len(set(prints.values())) > 1:
        told = ", ".join(f"{name} {prints[name]} ({paths[name]})" for name in prints)
        raise ModelError(f"tokenizers differ: {told}; make every stage from one base model")
    return next(iter(tokenizers.values()))


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int, path: str | Path) -> None:
    """ModelError if an id has no embedding, or `longest` tokens do not fit into the model's context."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    rows = embeddings.num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"{path}: its tokenizer ({tokenizer_fingerprint(tokenizer)}) has ids up to {highest}, the model has {rows} "
            "embeddings; give the model its own tokenizer"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ModelError(
            f"{path}: its context is {context} tokens, rows may have {longest}; lower max_tokens, or "
            "max_prompt_tokens + max_new_tokens"
        )


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


# models


def new_language_model(config: Pretrain, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small Llama (Touvron et al., arXiv 2302.13971) with tied embeddings and fresh weights."""
    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, attn_implementation=ATTENTION)


def loaded(kind: Any, path: str | Path, in_4bit: bool = False) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A transformers model in fp32 and what its loading left open; ModelError for a directory that holds none."""
    more = four_bits() if in_4bit else {}
    try:
        return kind.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
            attn_implementation=ATTENTION, **more,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: no model can be loaded from it: {first_line(error)}") from None


def four_bits() -> dict[str, Any]:
    """What `from_pretrained` wants for linear layers of 4 bits, NF4 (Dettmers et al., arXiv 2305.14314)."""
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("load_in_4bit: it needs a CUDA GPU and the package bitsandbytes; leave it out here")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "score"],
    )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": processes().device}}


def is_4bit(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.uint8 for parameter in model.parameters())


def keep_fp32(model: nn.Module) -> None:
    """Undoes that TRL's trainers round what is trained on a base of 4 bits to bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def in_full(base: PreTrainedModel) -> PreTrainedModel:
    """The base; of one in 4 bits, the language model that it was loaded from."""
    return without_adapter(loaded_language_model(str(base.name_or_path))) if is_4bit(base) else base


def load_language_model(path: str | Path, in_4bit: bool = False) -> PreTrainedModel:
    """A causal language model in fp32, without dropout; an adapter saved in the same directory is merged into it.

    Raises ModelError for a checkpoint that lacks weights, which transformers would draw at random, or that has a head
    of another kind, which it would drop: a reward model or critic with tied embeddings loads as a policy otherwise.
    """
    model = loaded_language_model(path, in_4bit)
    if in_4bit and adapter_layers(model):
        raise ModelError(f"{path}: its adapter cannot be merged into 4 bits; run merge on it, start from that")
    return without_dropout(merge_adapter(model))


def loaded_language_model(path: str | Path, in_4bit: bool = False) -> PreTrainedModel:
    """The same with its adapter on it."""
    model, info = loaded(AutoModelForCausalLM, path, in_4bit)
    if info["missing_keys"]:
        raise ModelError(f"{path}: not a whole language model: missing {', '.join(sorted(info['missing_keys'])[:5])}")
    heads = [name for name in sorted(info["unexpected_keys"]) if not name.startswith(f"{model.base_model_prefix}.")]
    if heads:
        raise ModelError(f"{path}: not a language model: it has a head that would not be used: {', '.join(heads[:5])}")
    return model


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapter added into its weights, every adapter layer gone and all trainable; in place."""
    for layer in adapter_layers(model):
        layer.merge(safe_merge=True)
    return without_adapter(model)


def without_dropout(model: Model) -> Model:
    """The model with every dropout at 0: a log-probability must be the same number whenever it is computed."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("attention_dropout"), float):
            vars(module)["attention_dropout"] = 0.0  # attention modules apply this attribute themselves
    return model


def with_adapter(model: PreTrainedModel, dials: Adapter, task: TaskType = TaskType.CAUSAL_LM) -> PeftModel:
    """The model frozen, under a fresh trainable adapter that changes nothing yet; a classifier's head is trained."""
    targets: Any = dials.adapter_targets.split(",") if dials.adapter_targets else None
    if dials.adapter == "lora":
        config: Any = LoraConfig(
            task_type=task,
            r=dials.lora_rank,
            lora_alpha=dials.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank: any number will do
            use_rslora=dials.rslora,
            use_dora=dials.dora,
            target_modules=targets or "all-linear",
        )
    elif dials.adapter == "ia3":
        config = IA3Config(task_type=task, target_modules=targets)
    else:
        raise ModelError(f"adapter: expected lora or ia3, got {dials.adapter}")
    return get_peft_model(model, config)


def load_policy(path: str | Path, dials: Adapter) -> Policy:
    """The SFT policy, to be trained: all of it, or an adapter on it, fresh and without effect.

    Where SFT is an adapter itself, that is what is trained further, on SFT's own base: the policy starts as its copy,
    and a frozen one is the reference. ModelError for dials that ask for another adapter than SFT's.
    """
    if dials.adapter == "none":
        return load_language_model(path)
    base = loaded_language_model(path, dials.load_in_4bit)
    sft = taken_off(base)
    if sft is None:
        return with_adapter(without_dropout(base), dials)
    check_dials(dials, sft.config, path)
    policy = get_peft_model(base, for_language_model(sft.config))
    fill(policy, POLICY, sft.weights)
    add_role(policy, REFERENCE, sft.config, sft.weights)
    return without_dropout(policy)


def check_dials(dials: Adapter, config: AdapterConfig, path: str | Path) -> None:
    """ModelError for a dial that is not as it was when the adapter at `path` was made; names it and both values."""
    made: dict[str, Any] = {"adapter": kind(config)}
    if isinstance(config, LoraConfig):
        made |= {"lora_rank": config.r, "lora_alpha": config.lora_alpha}
        made |= {"rslora": config.use_rslora, "dora": config.use_dora}
    for name, value in made.items():
        if getattr(dials, name) != value:
            raise ModelError(
                f"{path}: it is an adapter, which PPO trains further, and its {name} is {value}, not "
                f"{getattr(dials, name)}: say --{name} {value}, or --adapter none to train all weights"
            )
    targets = sorted(config.target_modules or ())
    if dials.adapter_targets and sorted(dials.adapter_targets.split(",")) != targets:
        raise ModelError(
            f"{path}: it is an adapter, which PPO trains further, and its adapter_targets are {','.join(targets)}, not "
            f"{dials.adapter_targets}: leave adapter_targets empty"
        )


def base_of(policy: Policy) -> PreTrainedModel:
    """The transformers model inside a policy; under an adapter its linear layers are the adapter's."""
    model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    assert isinstance(model, PreTrainedModel)
    return model


def frozen(model: Model) -> Model:
    """The model in eval mode, none of its parameters trainable."""
    model.requires_grad_(False)
    return model.eval()


def new_classifier(language_model: PreTrainedModel, pad_id: int) -> PreTrainedModel:
    """A sequence classifier with one label on a copy of the language model's trunk; its head is zero, its shift too.

    A trunk in 4 bits is not copied.
    """
    config = copy.deepcopy(language_model.config)
    config.num_labels, config.pad_token_id = 1, pad_id
    config.score_shift = 0.0
    device = torch.device("meta") if is_4bit(language_model) else nullcontext()
    with device:
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, attn_implementation=ATTENTION
        )
    if is_4bit(language_model):  # the trunk itself: PEFT and bitsandbytes know its layers
        setattr(model, model.base_model_prefix, language_model.base_model)
        model.score = nn.Linear(config.hidden_size, 1, bias=False, device=language_model.device)
        model.is_loaded_in_4bit, model.name_or_path = True, language_model.name_or_path
    else:
        model.base_model.load_state_dict(base_weights(language_model.base_model))
    nn.init.zeros_(head_weight(model))
    return without_dropout(model)


def new_reward_model(path: str | Path, tokenizer: PreTrainedTokenizerBase, in_4bit: bool = False) -> PreTrainedModel:
    """A language model's classifier with its head drawn from N(0, 1/(d+1)).

    The head's scale is that of Stiennon et al. (arXiv 2009.01325); its score starts near unit variance.
    """
    model = new_classifier(load_language_model(path, in_4bit), tokenizer.pad_token_id)
    nn.init.normal_(head_weight(model), std=(model.config.hidden_size + 1) ** -0.5)
    return model


def load_reward_model(path: str | Path) -> PreTrainedModel:
    """A reward model or critic with its head, an adapter merged into it.

    Raises ModelError if the head or the shift was not saved with it, or another head that would not be used.
    """
    return without_dropout(merge_adapter(loaded_reward_model(path)))


def loaded_reward_model(path: str | Path, in_4bit: bool = False) -> PreTrainedModel:
    """The same with its adapter on it."""
    model, info = loaded(AutoModelForSequenceClassification, path, in_4bit)
    if info["missing_keys"] or info["unexpected_keys"]:
        keys = sorted([*info["missing_keys"], *info["unexpected_keys"]])
        raise ModelError(f"{path}: not a whole reward model: missing or unused weights {', '.join(keys[:5])}")
    if model.config.num_labels != 1 or not hasattr(model.config, "score_shift"):
        raise ModelError(f"{path}: expected a reward model with one label and a score_shift, made by stages/reward.py")
    return model


def head_weight(model: PreTrainedModel) -> Tensor:
    """Weight (1, d) of the score head."""
    weight = model.get_submodule("score").weight
    assert isinstance(weight, Tensor)
    return weight


def last_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The trunk's last hidden states (B, S, d); input_ids (B, S), attention_mask (B, S) boolean."""
    return model.base_model(
        input_ids=input_ids.masked_fill(~attention_mask, 0),
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        use_cache=False,
    ).last_hidden_state


def head_outputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, shift: Tensor | float) -> Tensor:
    """The head's output minus shift at every position, (B, S) fp32; input_ids (B, S), attention_mask (B, S) boolean."""
    hidden = last_states(model, input_ids, attention_mask)
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), head_weight(model).float()).squeeze(-1) - shift


class Critic(nn.Module):
    """State values of a backbone of its own, started from a classifier: the reward model (Ouyang et al., arXiv
    2203.02155, C.4), or the SFT policy under a head of zeros.

    `shift` starts as the classifier's and is trained: the value head's bias, negated.
    """

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(classifier).requires_grad_(True)
        self.shift = nn.Parameter(torch.tensor([float(classifier.config.score_shift)]))  # ZeRO-3 and FSDP cut no scalar

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values (B, S) of the states after each token."""
        return head_outputs(self.model, input_ids, attention_mask, self.shift)

    def save(self, folder: Path) -> None:
        self.model.config.score_shift = self.shift.item()
        self.model.save_pretrained(folder)


class ValueHead(nn.Linear):
    """A linear function of the last hidden states of one role on the policy's base.

    State values of the policy's own states, zero at first (Ziegler et al., arXiv 1909.08593): one trunk, one forward,
    and the value loss trains the policy's trunk too. Or those of the critic's adapter, or the score of the reward's:
    then weight and bias are a classifier's head and its shift, negated.
    """

    def __init__(self, width: int, role: str = POLICY) -> None:
        super().__init__(width, 1)
        self.role = role
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (B, T) fp32 of hidden states (B, T, d)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1)

    @torch.no_grad()
    def save(self, folder: Path, policy: Policy, pad_id: int) -> None:
        """Writes the classifier that gives these values: the policy's trunk, its adapter merged, or the critic's role
        on the base, in the form of a reward model that is an adapter."""
        own = in_full(base_of(policy))
        if self.role == POLICY:
            own = merge_adapter(copy.deepcopy(own))
        classifier: Policy = new_classifier(own, pad_id)
        head_weight(base_of(classifier)).copy_(self.weight)
        classifier.config.score_shift = -self.bias.item()
        if self.role != POLICY:
            assert isinstance(policy, PeftModel)
            config = copy.deepcopy(policy.peft_config[self.role])
            config.task_type = TaskType.SEQ_CLS
            weights = get_peft_model_state_dict(policy, adapter_name=self.role)
            classifier = get_peft_model(base_of(classifier), config)
            fill(classifier, POLICY, weights | {f"{PREFIX}score.weight": self.weight})
        save_with_base(classifier, folder)


def load_reward(path: str | Path, policy: Policy) -> PreTrainedModel | ValueHead:
    """The frozen reward model; where it and the policy are adapters its head, its adapter then on the policy's base.

    Raises ModelError where it cannot be a role there: another type of adapter than the policy's, or another base.
    """
    model = loaded_reward_model(path)
    if not isinstance(policy, PeftModel) or not adapter_layers(model):
        return frozen(without_dropout(merge_adapter(model)))
    shift, weight = model.config.score_shift, head_weight(model)
    saved = taken_off(model)
    assert saved is not None
    theirs, ours = kind(saved.config), kind(config_of(policy))
    if theirs != ours:
        raise ModelError(
            f"{path}: it is {theirs} and the policy {ours}: roles on one base have one type of adapter; train "
            f"one of them again with the other's"
        )
    theirs, ours = trunk_fingerprint(model), trunk_fingerprint(in_full(base_of(policy)))
    if theirs != ours:
        raise ModelError(
            f"{path}: it is an adapter on another base ({theirs}) than the policy's ({ours}): train the reward model "
            "with --base of SFT's final/ or, where SFT is an adapter itself, of the model that SFT started from"
        )
    head = ValueHead(weight.shape[1], REWARD)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.fill_(-shift)
    own = {key: value for key, value in saved.weights.items() if key != f"{PREFIX}score.weight"}
    add_role(policy, REWARD, saved.config, own)
    return frozen(head)


class ActorCritic(nn.Module):
    """All that PPO trains, as one module: policy and critic, one forward, one optimiser.

    And what is frozen on the policy's base: the reference, and the reward model if `reward` is its head.
    """

    def __init__(
        self,
        policy: Policy,
        critic: Critic | ValueHead,
        temperature: float,
        pad_id: int,
        reward: ValueHead | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.critic, self.reward = policy, critic, reward
        self.temperature, self.pad_id = temperature, pad_id
        self.recomputes_layers = False
        self._no_split_modules = base_of(policy)._no_split_modules  # the layers that FSDP gathers one at a time

    def checkpoint_activations(self) -> None:
        """In train mode the layers then keep their input alone; dropout is 0, so both modes compute the same."""
        self.recomputes_layers = True
        for model in (base_of(self.policy), *([self.critic.model] if isinstance(self.critic, Critic) else [])):
            in_role = partial(in_the_same_role, adapter_layers(model))
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": in_role})

    def tie_weights(self) -> None:
        """Makes tied weights one again, after FSDP has loaded them one by one."""
        base_of(self.policy).tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        size: int = 0,
        trains_policy: bool = True,
        as_role: str = POLICY,
    ) -> tuple[Tensor, ...]:
        """Log-probabilities, entropies and values, each (B, T), of the last T = size tokens of (B, S) rows.

        values[:, t] is read before token t is emitted, as the log-probability of token t is. Without `trains_policy`
        the values have no gradient in the policy's trunk. `as_role`: of the reference, without values; or the reward
        role's scores (B, S) of what ends at each token, alone.
        """
        rows = (input_ids, attention_mask, size, self.temperature, self.pad_id)
        if as_role == REWARD:
            assert self.reward is not None
            return (self.role_outputs(self.reward, input_ids, attention_mask),)
        if as_role == REFERENCE:
            assert isinstance(self.policy, PeftModel)
            with role(self.policy, REFERENCE if REFERENCE in self.policy.peft_config else None):
                return response_logprobs(self.policy, *rows)
        if isinstance(self.critic, ValueHead) and self.critic.role == POLICY:
            logprobs, entropies, hidden = response_logprobs(self.policy, *rows, with_hidden=True)
            return logprobs, entropies, self.critic(hidden if trains_policy else hidden.detach())
        if isinstance(self.critic, Critic):
            values = self.critic(input_ids, attention_mask)
        else:
            values = self.role_outputs(self.critic, input_ids, attention_mask)
        logprobs, entropies = response_logprobs(self.policy, *rows)
        return logprobs, entropies, values[:, -size - 1 : -1]

    def role_outputs(self, head: ValueHead, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """A head on the states of its role, (B, S) fp32.

        For a gradient the trunk keeps its input alone. Called before the policy's forward it is computed again after
        the policy's backward, which frees what that has kept: there are never two roles' activations at a time.
        """

        def states() -> Tensor:
            with role(self.policy, head.role):
                return last_states(base_of(self.policy), input_ids, attention_mask)

        if not torch.is_grad_enabled() or (self.recomputes_layers and self.training):
            return head(states())
        return head(checkpoint(states, use_reentrant=False))

    def save_critic(self, folder: Path) -> None:
        """A directory from which `load_reward_model` gives these values."""
        if isinstance(self.critic, ValueHead):
            self.critic.save(folder, self.policy, self.pad_id)
        else:
            self.critic.save(folder)


def response_logprobs(
    model: Policy,
    input_ids: Tensor,
    attention_mask: Tensor,
    size: int,
    temperature: float,
    pad_id: int,
    with_hidden: bool = False,
) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies (B, T), in nats, of the last T = size tokens at the sampling temperature.

    input_ids (B, S), attention_mask (B, S) boolean. The padding token is left out of the distribution, as in sampling.
    `with_hidden` gives a third: the trunk's last states (B, T, d), each the one from which its token is predicted.
    """
    states: list[Tensor] = []
    trunk = base_of(model).base_model
    hook = trunk.register_forward_hook(lambda *given: states.append(given[2].last_hidden_state))
    output = model(
        input_ids=input_ids.masked_fill(~attention_mask, 0),
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        use_cache=False,
        logits_to_keep=size + 1,
    )
    hook.remove()
    logits, tokens = output.logits[:, :-1], input_ids[:, -size:]
    rows = max(1, MOST_LOGITS // logits[0].numel())
    if rows >= len(logits):
        found = token_logprobs(logits, tokens, temperature, pad_id)
    else:
        parts = zip(logits.split(rows), tokens.split(rows), strict=True)
        made = [checkpoint(token_logprobs, *part, temperature, pad_id, use_reentrant=False) for part in parts]
        found = tuple(torch.cat(column) for column in zip(*made, strict=True))
    return (*found, states[0][:, -size - 1 : -1]) if with_hidden else found


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float, pad_id: int) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies (B, T) of tokens (B, T) under logits (B, T, V) without the padding token."""
    return logprobs_and_entropy(logits_without(logits, [pad_id]), tokens, temperature)


# saving


def save_policy(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a directory that `AutoModelForCausalLM.from_pretrained` loads from anywhere, tokenizer included."""
    base = base_of(policy)
    base.generation_config = sampling_config(tokenizer, base)
    save_with_base(policy, folder)
    tokenizer.save_pretrained(folder)


def save_with_base(model: Policy, folder: Path) -> None:
    """Writes a model so that `from_pretrained` loads it from anywhere; of several adapters the policy's alone.

    With an adapter the directory holds the base it was trained on as well: an adapter alone names its base by a path,
    which is wrong as soon as the directory moves.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    base = base_of(model)
    weights = base_weights(base)
    if is_4bit(base):
        trunk = f"{base.base_model_prefix}."
        heads = {name: weight for name, weight in weights.items() if not name.startswith(trunk)}
        weights = {n: w for n, w in base_weights(in_full(base)).items() if n.startswith(trunk)} | heads
        vars(base).pop("hf_quantizer", None)  # else it would write weights of its own choice
        vars(base.config).pop("quantization_config", None)
    config = config_of(model)
    config.base_model_name_or_path = None
    source, base.name_or_path = base.name_or_path, None  # else PEFT writes this path again
    model.save_pretrained(str(folder), selected_adapters=[POLICY])
    base.name_or_path = source
    (folder / "README.md").unlink()  # a model card with empty headings
    if isinstance(config, LoraConfig) and config.use_dora:
        # PEFT leaves `.weight` off DoRA's magnitudes, and transformers, which wants it, then has them at their start.
        file = folder / "adapter_model.safetensors"
        named = {f"{k}.weight" if k.endswith("lora_magnitude_vector") else k: w for k, w in load_file(file).items()}
        save_file(named, file, metadata={"format": "pt"})
    base.save_pretrained(folder, state_dict=weights)


def sampling_config(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> GenerationConfig:
    """Pure sampling: nothing truncates the distribution (an unset top_k means 50), and padding is never sampled."""
    return GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        repetition_penalty=1.0,
        suppress_tokens=[tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )

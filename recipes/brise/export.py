"""Write brise as a Hugging Face directory: weights in bf16, tokenizer, chat template, card and checksums.

    python recipes/brise/export.py --run RUN --stage polish --out brise
    python recipes/brise/export.py --run RUN --out brise --card-only     (after evaluate.py)

Owns the spelling of the files. The card's text is in card.py.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from card import model_card
from chat import BOS, EOS, PAD
from mixture import CONTROL_TOKENS, STAGES, Mixture
from network import Weights
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from train import read_weights

from bise.config import ModelConfig
from bise.model.tensor_names import hf_location
from bise.model.transformer import weight_shapes
from bise.train.balance import BALANCE

TEMPERATURE = 0.5
"""Suggested for sampling. Of 66 answers 65 were right at 0.3, 64 at 0.5, 63 at 0.7; of the 4-grams of 18
stories 12 %, 6 % and 3 % were repeats."""
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0]['content'] + '[/SYSTEM_PROMPT]' }}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('after an optional system message, user and assistant must alternate') }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('brise knows the roles system, user and assistant only') }}
    {%- endif %}
{%- endfor %}
"""


def stored_names(config: ModelConfig) -> dict[str, str]:
    """Return the Hugging Face name of every weight, as bise's own reader expects it."""
    return {
        name: hf_location(name, shape, config, ()).stored_name
        for name, shape in weight_shapes(config).items()
    }


def write_weights(out: Path, config: ModelConfig, weights: Weights) -> None:
    """Write `model.safetensors` in bf16."""
    names = stored_names(config)
    tensors = {
        names[name]: weight.detach().to(torch.bfloat16).contiguous() for name, weight in weights.items()
    }
    path = out / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private


def write_configs(out: Path, config: ModelConfig) -> None:
    """Write `config.json`, `generation_config.json` and `tokenizer_config.json`."""
    family: dict[str, object] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    if config.is_moe:
        family = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "router_aux_loss_coef": BALANCE,
        }
    _write_json(
        out / "config.json",
        {
            **family,
            "hidden_size": config.dim,
            "intermediate_size": config.hidden_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "sliding_window": config.windows[0],
            "max_position_embeddings": config.max_context,
            "rope_theta": config.rope_theta,
            "rms_norm_eps": config.norm_eps,
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": True,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "torch_dtype": "bfloat16",
        },
    )
    _write_json(
        out / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "temperature": TEMPERATURE},
    )
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bise_template": "v7-tekken",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "additional_special_tokens": [
                token for token in CONTROL_TOKENS if token not in ("<s>", "</s>", "<unk>", "<pad>")
            ],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_context,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_tokenizer(run: Path, out: Path) -> None:
    """Write `tokenizer.json`: the trained one, with `<s>` in front of every text."""
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]  # stubs lack the setter
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save(str(out / "tokenizer.json"))


def write_checksums(out: Path) -> None:
    """Write `SHA256SUMS` over every other file of the directory."""
    files = sorted(path for path in out.iterdir() if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (out / "SHA256SUMS").write_text("".join(lines), "utf-8")


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main() -> None:
    """Export a checkpoint, or renew the card of an export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder with tokenizer.json and checkpoints")
    parser.add_argument("--stage", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--card-only", action="store_true", help="leave the weights, renew card and checksums"
    )
    parser.add_argument("--mixture", type=Path, default=Path(__file__).with_name("mixture.toml"))
    args = parser.parse_args()
    mixture = Mixture.load(args.mixture)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.card_only:
        write_weights(
            args.out, mixture.shape(args.stage), read_weights(args.run / f"{args.stage}.safetensors")
        )
        write_configs(args.out, mixture.shape(args.stage))
        write_tokenizer(args.run, args.out)
    (args.out / "README.md").write_text(model_card(args.run, mixture), "utf-8")
    write_checksums(args.out)
    size_bytes = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"wrote {args.out}: {size_bytes / 1e6:.1f} MB, {mixture.shape(args.stage).num_params} parameters")


if __name__ == "__main__":
    main()

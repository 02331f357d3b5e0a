"""Train and export Baton's demo language model.

This file knows three things: how the tokenizer is trained (byte-level BPE over
the text that `corpus.py` writes), what the network is (a Llama-shaped decoder
in plain PyTorch, laid out so that every tensor maps one-to-one on to Hugging
Face's LlamaForCausalLM), and how the result is written as an ordinary Hugging
Face model directory. It deliberately does not import transformers: `sample.py`
loads the export through transformers instead, so that the two implementations
check each other.

The recipe is chosen for one CPU core and well under an hour: Muon for the
hidden matrices (it needs far fewer tokens than AdamW at this size), AdamW for
the embedding and the norms, a warmup-stable-decay schedule, short sequences
first and full-length ones for the last part, when the learning rate falls.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

import corpus

VOCAB_SIZE = 2048
HIDDEN = 256
LAYERS = 4
HEADS = 8
KV_HEADS = 4
HEAD_DIM = 32
INTERMEDIATE = 640
ROPE_THETA = 10000.0
MAX_POSITIONS = 2048
NORM_EPS = 1e-5
SHORT_LENGTH = 512

SPECIAL_TOKENS = [
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]
BOS, EOS, PAD, SYSTEM, USER, ASSISTANT, END = range(len(SPECIAL_TOKENS))

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


# --- the network -----------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x):
        return F.rms_norm(x, (HIDDEN,), self.weight.to(x.dtype), NORM_EPS)


def rope_tables(length):
    """Cosines and sines in Hugging Face's half-split order."""
    inverse = 1.0 / ROPE_THETA ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    angles = torch.outer(torch.arange(length).float(), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        repeat = HEADS // KV_HEADS
        k = k.repeat_interleave(repeat, dim=1)
        v = v.repeat_interleave(repeat, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = RMSNorm()
        self.self_attn = Attention()
        self.post_attention_layernorm = RMSNorm()
        self.mlp = MLP()

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLlama(nn.Module):
    """Attribute names follow Hugging Face, so the export only adds a prefix."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, HIDDEN)
        self.layers = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = RMSNorm()
        cos, sin = rope_tables(MAX_POSITIONS)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 if "embed" in name else HIDDEN**-0.5)
            # Branches that start silent make the first steps stable.
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.bfloat16)
        length = tokens.shape[1]
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def token_losses(model, batch, low_precision):
    """Per-token cross-entropy of a (rows, length + 1) batch."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low_precision):
        logits = model(inputs)
    losses = F.cross_entropy(
        logits.float().view(-1, VOCAB_SIZE), targets.reshape(-1), reduction="none"
    )
    return losses.view(targets.shape)


# --- the optimiser ---------------------------------------------------------


def orthogonalise(gradients, low_precision):
    """Newton-Schulz iteration on a stack of equal-shaped matrices."""
    x = gradients.to(torch.bfloat16 if low_precision else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-2, -1)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(-2, -1)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    if tall:
        x = x.transpose(-2, -1)
    return x.float()


class Muon:
    """Momentum whose update is orthogonalised; for the hidden matrices only."""

    def __init__(self, parameters, momentum=0.95, weight_decay=0.05, low_precision=True):
        self.groups = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.buffers = {
            shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()
        }
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.low_precision = low_precision

    @torch.no_grad()
    def step(self, rate):
        for shape, group in self.groups.items():
            gradients = torch.stack([parameter.grad for parameter in group])
            buffer = self.buffers[shape]
            buffer.lerp_(gradients, 1 - self.momentum)
            update = orthogonalise(gradients.lerp(buffer, self.momentum), self.low_precision)
            scale = rate * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, change in zip(group, update):
                parameter.mul_(1 - rate * self.weight_decay)
                parameter.add_(change, alpha=-scale)


# --- tokenizer and data ----------------------------------------------------


def train_tokenizer(texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        # All 256 bytes are in the vocabulary, so any UTF-8 text has tokens.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A",
        pair="<|bos|> $A <|bos|> $B",
        special_tokens=[("<|bos|>", BOS)],
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def render(document):
    """The exact text of a training document, chat marks included.

    A document is a string (plain story) or a list of (role, text) turns. The
    chat form must equal what CHAT_TEMPLATE produces.
    """
    if isinstance(document, str):
        return "<|bos|>" + document + "<|eos|>"
    turns = "".join(f"<|{role}|>\n{text}<|end|>\n" for role, text in document)
    return "<|bos|>" + turns


def encode_documents(tokenizer, documents, wanted_tokens):
    """Encode documents until there are enough tokens; returns (ids, bytes).

    The byte count leaves out the special marks: it is what bits per byte is
    measured against.
    """
    pieces, total, text_bytes, batch = [], 0, 0, []
    for document in documents:
        batch.append(document)
        if len(batch) == 512:
            rendered = [render(item) for item in batch]
            for item in batch:
                parts = [item] if isinstance(item, str) else [text for _, text in item]
                text_bytes += sum(len(part.encode()) for part in parts)
            for encoding in tokenizer.encode_batch(rendered, add_special_tokens=False):
                pieces.append(np.array(encoding.ids, dtype=np.uint16))
                total += len(encoding.ids)
            batch = []
            if total >= wanted_tokens:
                break
    return np.concatenate(pieces), text_bytes


def windows(stream, length, rng):
    """Shuffled, non-overlapping windows of length + 1 tokens."""
    count = (len(stream) - 1) // length
    order = rng.permutation(count)
    for index in order:
        start = int(index) * length
        yield stream[start : start + length + 1]


def batches(stream, length, tokens_per_step, rng):
    """Batches without end; a second epoch gets a fresh order."""
    rows = []
    while True:
        for row in windows(stream, length, rng):
            rows.append(row)
            if len(rows) * length >= tokens_per_step:
                yield torch.from_numpy(np.stack(rows).astype(np.int64))
                rows = []


# --- evaluation and export -------------------------------------------------


@torch.no_grad()
def evaluate(model, stream, length, limit_rows, low_precision):
    """Mean loss per position over the first windows of a held-out stream."""
    count = min(limit_rows, (len(stream) - 1) // length)
    rows = np.stack([stream[i * length : (i + 1) * length + 1] for i in range(count)])
    rows = torch.from_numpy(rows.astype(np.int64))
    losses = [token_losses(model, rows[i : i + 4], low_precision) for i in range(0, count, 4)]
    return torch.cat(losses).mean(dim=0)


def write_atomically(path, write):
    """Readers may load the directory while training runs: never half a file."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    temporary.chmod(0o644)
    os.replace(temporary, path)


def write_json(path, value):
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


LICENSE_NOTE = """\
The files in this directory (weights, tokenizer and configuration) are licensed
under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0

The model was trained from scratch, and only on text generated by
scripts/tiny-model/corpus.py in this repository. No other text, model or data
set was used.
"""


def export(model, tokenizer, out):
    """Write the Hugging Face model directory."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{name}": weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.named_parameters()
    }
    write_atomically(
        out / "model.safetensors", lambda p: save_file(tensors, str(p), metadata={"format": "pt"})
    )
    write_atomically(out / "tokenizer.json", lambda p: tokenizer.save(str(p)))
    write_json(
        out / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": NORM_EPS,
            "rope_theta": ROPE_THETA,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": BOS,
            "eos_token_id": [EOS, END],
            "pad_token_id": PAD,
            "torch_dtype": "bfloat16",
        },
    )
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": BOS,
            "eos_token_id": [EOS, END],
            "pad_token_id": PAD,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.95,
        },
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_POSITIONS,
            "bos_token": "<|bos|>",
            "eos_token": "<|eos|>",
            "pad_token": "<|pad|>",
            "unk_token": None,
            "additional_special_tokens": SPECIAL_TOKENS[SYSTEM:],
            "added_tokens_decoder": {
                str(index): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for index, token in enumerate(SPECIAL_TOKENS)
            },
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    write_atomically(out / "LICENSE", lambda p: p.write_text(LICENSE_NOTE))


# --- the run ---------------------------------------------------------------


def rate_factor(step, progress, second_stage):
    """Linear warmup, a long flat part, then a linear fall almost to zero.

    The second stage starts at less than half the rate and only falls.
    """
    warmup = min(1.0, (step + 1) / 60)
    if second_stage:
        return warmup * max(0.01, 0.45 * (1.0 - progress))
    fall = 1.0 if progress < 0.55 else max(0.02, (1.0 - progress) / 0.45)
    return warmup * fall


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here.parents[1] / "examples/models/tiny")
    parser.add_argument("--work", type=Path, default=Path("target/tiny-model"),
                        help="checkpoints, tokens and the log go here")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--minutes", type=float, default=0.0,
                        help="finish the schedule within this time even if the steps are not done")
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--train-tokens", type=int, default=11_600_000)
    parser.add_argument("--long-share", type=float, default=0.18,
                        help="share of the schedule that runs at full length")
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--embedding-rate", type=float, default=0.004)
    parser.add_argument("--export-minutes", type=float, default=4.0)
    parser.add_argument("--resume", type=Path,
                        help="second stage: go on from this checkpoint with more chats and a falling rate")
    parser.add_argument("--float32", action="store_true", help="do not use bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--bench", type=int, default=0, help="time this many steps on noise and stop")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    low_precision = not args.float32
    model = TinyLlama()
    stepper = torch.compile(model, dynamic=False) if args.compile else model
    matrices = [w for n, w in model.named_parameters() if w.ndim == 2 and "embed" not in n]
    others = [w for n, w in model.named_parameters() if w.ndim == 1 or "embed" in n]
    muon = Muon(matrices, low_precision=low_precision)
    adam = torch.optim.AdamW(others, lr=args.embedding_rate, betas=(0.9, 0.98), weight_decay=0.0)
    print("parameters:", sum(w.numel() for w in model.parameters()), flush=True)

    def train_step(batch, factor):
        loss = token_losses(stepper, batch, low_precision).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(args.matrix_rate * factor)
        for group in adam.param_groups:
            group["lr"] = args.embedding_rate * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    if args.bench:
        for length in (SHORT_LENGTH, MAX_POSITIONS):
            batch = torch.randint(0, VOCAB_SIZE, (args.tokens_per_step // length, length + 1))
            train_step(batch, 0.0)
            started = time.time()
            for _ in range(args.bench):
                train_step(batch, 0.0)
            seconds = (time.time() - started) / args.bench
            print(f"length {length}: {seconds:.3f} s/step, {args.tokens_per_step / seconds:.0f} tokens/s")
        return

    args.work.mkdir(parents=True, exist_ok=True)
    log = open(args.work / "log.jsonl", "a")

    def note(**fields):
        print(json.dumps(fields), file=log, flush=True)
        print(" ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}"
                       for k, v in fields.items()), flush=True)

    started = time.time()
    if args.resume:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
        short_text = corpus.documents(args.seed + 10, "train", long_share=0.02, chat_share=0.8, practice=True)
        long_text = corpus.documents(args.seed + 11, "train", long_share=0.6)
    else:
        sample = corpus.documents(args.seed, "train")
        tokenizer = train_tokenizer(render(next(sample)) for _ in range(12000))
        short_text = corpus.documents(args.seed, "train")
        long_text = corpus.documents(args.seed + 1, "train", long_share=0.6)
    # The last part uses its own stream, richer in long stories and long chats.
    long_tokens = int(args.train_tokens * args.long_share * 1.05)
    short_stream, _ = encode_documents(
        tokenizer, short_text, args.train_tokens - long_tokens)
    long_stream, _ = encode_documents(
        tokenizer, long_text, long_tokens)
    held_stream, held_bytes = encode_documents(
        tokenizer, corpus.documents(args.seed + 2, "held-out", long_share=0.4), 260_000)
    note(event="data", train=len(short_stream) + len(long_stream), held_out=len(held_stream),
         held_out_bytes=held_bytes, seconds=time.time() - started)

    rng = np.random.default_rng(args.seed)
    short_batches = batches(short_stream, SHORT_LENGTH, args.tokens_per_step, rng)
    long_batches = batches(long_stream, MAX_POSITIONS, args.tokens_per_step, rng)

    if args.resume:
        model.load_state_dict(torch.load(args.resume))
    started, cpu_started = time.time(), time.process_time()
    last_export, smooth, seen, step = started, None, 0, 0
    while True:
        elapsed = time.time() - started
        progress = step / args.steps
        if args.minutes:
            progress = max(progress, elapsed / (60 * args.minutes))
        if progress >= 1.0:
            break
        # The second stage mixes the lengths, so that neither is forgotten.
        full_length = rng.random() < args.long_share if args.resume else progress >= 1.0 - args.long_share
        batch = next(long_batches if full_length else short_batches)
        loss = train_step(batch, rate_factor(step, progress, bool(args.resume)))
        seen += batch.shape[0] * (batch.shape[1] - 1)
        smooth = loss if smooth is None else 0.9 * smooth + 0.1 * loss
        step += 1
        if step % 20 == 0:
            note(step=step, progress=progress, loss=smooth, tokens=seen, seconds=time.time() - started)
        if time.time() - last_export > 60 * args.export_minutes:
            last_export = time.time()
            held = evaluate(model, held_stream, SHORT_LENGTH, 16, low_precision).mean().item()
            torch.save(model.state_dict(), args.work / "checkpoint.pt")
            export(model, tokenizer, args.out)
            note(event="export", step=step, held_out=held)

    wall, cpu = time.time() - started, time.process_time() - cpu_started
    torch.save(model.state_dict(), args.work / "checkpoint.pt")
    export(model, tokenizer, args.out)
    np.save(args.work / "held_out.npy", held_stream)
    note(event="done", steps=step, tokens=seen, wall_seconds=wall, cpu_seconds=cpu)

    # What is measured is the export: the weights as rounded to bfloat16.
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16).float())
    by_position = evaluate(model, held_stream, MAX_POSITIONS, 120, False)
    mean = by_position.mean().item()
    edges = [0, 128, 512, 1024, 1536, 2048]
    note(event="held-out", nats_per_token=mean,
         bits_per_byte=mean * len(held_stream) / held_bytes / math.log(2),
         **{f"positions_{a}_{b}": by_position[a:b].mean().item() for a, b in zip(edges, edges[1:])})


if __name__ == "__main__":
    sys.exit(main())

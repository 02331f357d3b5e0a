"""Load the exported demo model through Hugging Face transformers and write its page.

This file knows nothing of the training code's network: it opens the exported
directory the way any user of transformers would, so a page written by it is
also a proof that weights, tokenizer, chat template and generation settings
agree with each other. It measures what a reader wants to know of such a model
(is the text readable, does it answer, does it still remember at position
1,900), checks that every prompt shown is absent from the training text, and
writes all of it, with the figures of the training log, to docs/demo-model.md.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus
import train

ROOT = Path(__file__).resolve().parents[2]

PLAIN_PROMPTS = [
    "Once upon a time, a small fox named Quill lived",
    "One rainy morning, a frog named Peep lost his green umbrella",
    "The narrow bridge was covered with yellow leaves, and",
    "Deep in the forest, a hungry bear named Thistle",
    "\"Where is my lantern?\" asked Marlo the badger.",
    "Grandfather put on his thick coat and",
    "It was the night before the big race, and Sable the rabbit",
    "Long ago, in a village by the sea, there lived a sailor named Orla.",
    "Tansy the hedgehog had never seen the sea before.",
    "The wind blew hard, and the little boat",
    "There was once a dragon who was afraid of butterflies.",
    "Every evening, the old clockmaker climbed the stairs and",
    "Bram and Nettie were best friends.",
]

PASSAGE = (
    "Corla the otter had a tin whistle. One day she lost it near the mill. "
    "Old Brack the goose found it in the grass and gave it back to her."
)

CHAT_PROMPTS = [
    [("user", "Tell me a story about a fox and the old bridge, please.")],
    [("user", "Tell me a story about a penguin named Waddle.")],
    [("system", "Your name is Juniper."), ("user", "Hello! What is your name?")],
    [("user", "What's the opposite of brave?")],
    [("user", "Hello, my name is Corin."), ("assistant", "Hello, Corin! It is nice to meet you."),
     ("user", "Which is bigger, an ant or an elephant?"), ("assistant", "An elephant is bigger than an ant."),
     ("user", "Can you tell me what my name is?")],
    [("user", f"Read this story and answer the question.\n\n{PASSAGE}\n\nWho found the whistle?")],
    [("user", "Please write a little poem about the sea.")],
    [("user", "Who discovered penicillin?")],
    [("user", "Tell me a story about a wizard who lost his purple hat.")],
]

FIRST_COMMAND = "python train.py --compile --minutes 32"
SECOND_COMMAND = (
    "python train.py --compile --minutes 7 --resume target/tiny-model/checkpoint.pt "
    "\\\n    --work target/tiny-second --train-tokens 2400000 --long-share 0.25"
)

SAMPLED_PROMPTS = PLAIN_PROMPTS[:2] + [CHAT_PROMPTS[1]]


class Demo:
    def __init__(self, directory):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def prompt_ids(self, prompt):
        """Plain text is encoded with its <|bos|>; the chat template brings its own."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        messages = [{"role": role, "content": text} for role, text in prompt]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The training text and the published template must be the same thing.
        assert rendered == train.render(prompt) + "<|assistant|>\n", rendered
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def complete(self, prompt, limit, **settings):
        ids = torch.tensor([self.prompt_ids(prompt)])
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, **{"do_sample": False, "temperature": None, "top_p": None, **settings}
        )
        new = output[0, ids.shape[1] :]
        finished = int(new[-1]) in (train.EOS, train.END)
        return self.tokenizer.decode(new, skip_special_tokens=True).strip("\n"), finished, ids.shape[1]


# --- checks ----------------------------------------------------------------


def unseen(prompts, seed):
    """Fail if a prompt occurs in the text the model was trained on."""
    needles = [p if isinstance(p, str) else p[-1][1] for p in prompts]
    seen = set()
    for stream, count, settings in ((seed, 45000, {}), (seed + 1, 6000, {"long_share": 0.6})):
        source = corpus.documents(stream, "train", **settings)
        for _ in range(count):
            text = train.render(next(source))
            seen.update(needle for needle in needles if needle in text)
    assert not seen, f"in the training text: {seen}"


def held_out_chats(seed, long):
    rng = random.Random(f"{seed}/accuracy/{long}")
    while True:
        yield corpus.chat(rng, "held-out", long=long)


def accuracy(demo, seed, wanted):
    """Exact-match share of greedy answers in held-out chats, by kind of question."""
    tally = {}

    def judge(kind, turns):
        right, total = tally.get(kind, (0, 0))
        if total >= wanted:
            return
        answer, _, _ = demo.complete(turns[:-1], 40)
        tally[kind] = (right + (answer.strip() == turns[-1][1]), total + 1)

    chats = held_out_chats(seed, long=False)
    for _ in range(wanted * 12):
        turns = next(chats)
        last, question = turns[-1][1], turns[-2][1]
        earlier = [text for role, text in turns[:-2] if role == "assistant" and len(text) > 400]
        if earlier and len(last) < 80 and question.endswith("?") and "story" not in question:
            judge("a question about the story just told", turns)
        elif "Read th" in question and len(last) < 80:
            judge("a question about a story in the prompt", turns)
        elif question in ("What is my name?", "Do you know my name?", "Who am I?"):
            judge("the user's name, told earlier", turns)
    chats = held_out_chats(seed, long=True)
    for _ in range(wanted * 8):
        turns = next(chats)
        if not turns[-2][1].startswith("What was the name of the"):
            continue
        length = len(demo.prompt_ids(turns[:-1]))
        if length < 512 or length > 2000:
            continue
        bucket = "512 to 1,023" if length < 1024 else "1,024 to 1,535" if length < 1536 else "1,536 to 2,000"
        judge(f"the name of an earlier hero, asked at position {bucket}", turns)
    rng = random.Random(f"{seed}/facts")
    facts = set()
    while len(facts) < wanted:
        question, answer = corpus.plain_fact(rng)
        # Sums, names of days, opposites and so on: one right answer each.
        if not answer.startswith(("Three ",)):
            facts.add((question, answer))
    for question, answer in sorted(facts):
        judge("a fact of the small world (the facts themselves were in training)", [("user", question), ("assistant", answer)])
    return tally


# --- the page --------------------------------------------------------------


def in_order(item):
    """By name, but with "position 512" before "position 1,024"."""
    name = item[0]
    return (name.split(" position ")[0], len(name.split(" position ")[-1].split(" ")[0]), name)


def quote(text):
    return "\n".join("> " + line if line else ">" for line in text.split("\n"))


def show(prompt, completion, finished):
    tail = "" if finished else " […]"
    if isinstance(prompt, str):
        return f"**Prompt:** `{prompt}`\n\n{quote(completion.strip() + tail)}\n"
    turns = "\n".join(f"- {role}: {text}".replace("\n\n", " / ") for role, text in prompt)
    return f"{turns}\n\n{quote(completion.strip() + tail)}\n"


def read_log(path):
    """The events of the newest run in a log."""
    events = [json.loads(line) for line in path.read_text().splitlines()]
    start = max(i for i, e in enumerate(events) if e.get("event") == "data")
    events = events[start:]
    named = {e["event"]: e for e in events if "event" in e}
    return named, [e for e in events if "loss" in e]


PAGE = """\
# The demo model

`examples/models/tiny` is a small language model for trying Baton without
downloading anything. It is laid out as a published Hugging Face model
(`LlamaForCausalLM`, bfloat16 safetensors, `tokenizer.json`, a chat template),
so whatever loads it loads a real Llama-shaped model in the same way.

It writes short stories in simple English and holds short chats about them. It
knows a small invented world and nothing else. Use it to see that a deployment
works from end to end, not to learn facts.

What to expect: sentences and stories are readable, and a story keeps to its
hero most of the time. But it was trained on only a few million tokens. It often
mixes up objects, secondary names and he/she within a story, repeats a few
favourite plots when decoding is greedy, follows only part of a request, and
gets half or more of the questions wrong (the table below has the counts).

- **Licence:** Apache-2.0, like the rest of this repository. It was trained from
  scratch on text generated by `scripts/tiny-model/corpus.py`; no other text,
  model or data set was used.
- **Shape:** {parameters:,} parameters; vocabulary {vocab} (byte-level BPE, so any
  UTF-8 text can be encoded), hidden size {hidden}, {layers} layers, {heads} heads,
  {kv_heads} key/value heads, head size {head_dim}, MLP size {mlp}, tied embeddings,
  RoPE theta 10,000, 2,048 positions.
- **Size:** {megabytes:.1f} MB for the whole directory.
- **Special tokens:** {specials}. Generation stops at `<|eos|>` (plain text) or
  `<|end|>` (chat).

## Training

Commands, run in `scripts/tiny-model` on one CPU thread (how to set up the
environment is in `scripts/tiny-model/README.md`):

```sh
{first_command}
{second_command}
```

The first stage was stopped by hand, and the second went on from its newest
checkpoint, the one at step {first_steps:,}. The second stage shows more short
questions and mixes both sequence lengths while the learning rate falls to zero.

| | first stage | second stage |
|---|---|---|
| seed | {seed} | {seed} |
| optimiser steps (4,096 tokens each) | {first_steps:,} | {steps:,} |
| tokens seen | {first_tokens:,} | {tokens:,} |
| sequence length | 512 | 512, and 2,048 in {long_percent:.0f} % of the steps |
| wall time, minutes | {first_wall:.1f} | {wall:.1f} |
| CPU time, minutes | not recorded (one thread) | {cpu:.1f} |
| generating and encoding the text, seconds | {first_data_seconds:.0f} | {data_seconds:.0f} |

That is {all_tokens:,} tokens in all. The machine was shared with other work, and
`--minutes` ends a schedule by the clock, so another machine makes a different
number of steps in it. Give `--steps` without `--minutes` for a run that does
not depend on speed. The text of the first stage still said "a honest" where
`corpus.py` now says "an honest"; nothing else in it has changed since.

## Held-out loss

The held-out text comes from another random seed, and every (hero, place,
object) triple in its stories is one of the eighth of all triples that training
never shows. Measured on {held_tokens:,} tokens in windows of 2,048, with the
weights as exported (rounded to bfloat16):

| | |
|---|---|
| nats per token | {nats:.4f} |
| bits per byte | {bits:.4f} |

| position in the window | nats per token |
|---|---|
{positions}

The text is drawn at random from a grammar, so a part of this loss (which name,
which place, which of several wordings) cannot be removed by any model.

## Answers in held-out chats

Greedy answers, counted as right only if they are the expected sentence to the
letter:

| question | right |
|---|---|
{accuracies}

## Samples

The prompts below do not occur in the training text (the script checks this).
Written by this command, which loads the exported directory with transformers:

```sh
{sample_command}
```

Completions are greedy and end by themselves unless they end with […] (cut at
{limit} tokens).

### Plain completion

{plain}
### Chat

{chats}
### Sampled, temperature 0.7, top-p 0.95

{sampled}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples/models/tiny")
    parser.add_argument("--first", type=Path, default=Path("target/tiny-model"), help="the --work of the first stage")
    parser.add_argument("--work", type=Path, default=Path("target/tiny-second"), help="the --work of the second stage")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/demo-model.md")
    parser.add_argument("--first-command", default=FIRST_COMMAND)
    parser.add_argument("--second-command", default=SECOND_COMMAND)
    parser.add_argument("--long-share", type=float, default=0.25, help="the second stage's --long-share")
    parser.add_argument("--seed", type=int, default=7, help="the seed that train.py was given")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--count", type=int, default=40, help="questions of each kind")
    parser.add_argument("--print", dest="show_only", action="store_true", help="print samples and write no page")
    args = parser.parse_args()

    torch.set_num_threads(1)
    demo = Demo(args.model)
    plain = [show(p, *demo.complete(p, args.limit)[:2]) for p in PLAIN_PROMPTS]
    chats = [show(p, *demo.complete(p, args.limit)[:2]) for p in CHAT_PROMPTS]
    sampled = []
    for index, prompt in enumerate(SAMPLED_PROMPTS):
        torch.manual_seed(index)
        sampled.append(show(prompt, *demo.complete(prompt, args.limit, do_sample=True, temperature=0.7, top_p=0.95)[:2]))
    if args.show_only:
        print("\n".join(plain + chats + sampled))
        return

    started = time.time()
    unseen(PLAIN_PROMPTS + CHAT_PROMPTS, args.seed)
    print(f"prompts are unseen ({time.time() - started:.0f} s)", flush=True)
    tally = accuracy(demo, args.seed + 3, args.count)
    for kind, (right, total) in tally.items():
        print(f"{right}/{total} {kind}", flush=True)

    first, first_progress = read_log(args.first / "log.jsonl")
    # Events are kept by name, so "export" is the newest: the checkpoint that was resumed.
    first_steps = first["export"]["step"]
    first_wall = max(e["seconds"] for e in first_progress if e["step"] <= first_steps)
    named, _ = read_log(args.work / "log.jsonl")
    done, held, data = named["done"], named["held-out"], named["data"]
    buckets = [(k.split("_")[1:], v) for k, v in held.items() if k.startswith("positions_")]
    page = PAGE.format(
        parameters=sum(w.numel() for w in demo.model.parameters()),
        vocab=train.VOCAB_SIZE, hidden=train.HIDDEN, layers=train.LAYERS, heads=train.HEADS,
        kv_heads=train.KV_HEADS, head_dim=train.HEAD_DIM, mlp=train.INTERMEDIATE,
        megabytes=sum(f.stat().st_size for f in args.model.iterdir()) / 1e6,
        specials=", ".join(f"`{t}` {i}" for i, t in enumerate(train.SPECIAL_TOKENS)),
        first_command=args.first_command, second_command=args.second_command, seed=args.seed,
        first_steps=first_steps, first_tokens=first_steps * 4096, first_wall=first_wall / 60,
        first_data_seconds=first["data"]["seconds"], all_tokens=first_steps * 4096 + done["tokens"],
        long_percent=100 * args.long_share, tokens=done["tokens"], steps=done["steps"], wall=done["wall_seconds"] / 60, cpu=done["cpu_seconds"] / 60,
        data_seconds=data["seconds"], held_tokens=min(120, (data["held_out"] - 1) // 2048) * 2048,
        nats=held["nats_per_token"], bits=held["bits_per_byte"],
        positions="\n".join(f"| {int(a):,} to {int(b) - 1:,} | {v:.4f} |" for (a, b), v in buckets),
        accuracies="\n".join(f"| {k} | {r} of {n} |" for k, (r, n) in sorted(tally.items(), key=in_order)),
        sample_command="python sample.py",
        limit=args.limit, plain="\n".join(plain), chats="\n".join(chats), sampled="\n".join(sampled),
    )
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page)


if __name__ == "__main__":
    sys.exit(main())

"""Drives a running Baton through the official OpenAI client, as any user's program would.

Usage: drive.py BASE_URL MODEL. Exits non-zero at the first difference from what the client's types promise.
"""

import sys

import openai

base_url, model = sys.argv[1:3]
client = openai.OpenAI(base_url=base_url + "/v1", api_key="unused", max_retries=0, timeout=60)
PROMPT = "Once upon a time, a small fox"
MESSAGES = [{"role": "user", "content": "Tell me a story about a fox and a bridge."}]


def check(condition, what):
    if not condition:
        raise SystemExit(f"FAILED: {what}")
    print(f"ok: {what}")


def refused(kind, status, param, call):
    try:
        call()
    except kind as error:
        check(error.status_code == status, f"{kind.__name__} {status}: {error.message}")
        check(param is None or error.param == param, f"it names the parameter {param!r} (found {error.param!r})")
        return
    raise SystemExit(f"FAILED: expected {kind.__name__}")


# models
models = client.models.list()
check([m.id for m in models.data] == [model], "models.list names the served model")
check(client.models.retrieve(model).id == model, "models.retrieve finds it")

# completions
plain = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
text = plain.choices[0].text
check(plain.object == "text_completion" and len(text) > 20, f"completion: {text!r}")
check(plain.choices[0].finish_reason in ("length", "stop"), "finish reason")
usage = plain.usage
check(usage.completion_tokens <= 24 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, "usage adds up")
check(usage.prompt_tokens_details.cached_tokens >= 0, "usage tells cached tokens")
again = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
check(again.choices[0].text == text, "greedy is reproducible")

stream = client.completions.create(
    model=model, prompt=PROMPT, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
check("".join(c.choices[0].text for c in chunks if c.choices) == text, "streamed text is the same")
check(chunks[-1].usage.completion_tokens == usage.completion_tokens, "streamed usage is the same")
check(sum(1 for c in chunks if c.choices) > 5, "tokens arrive one by one")

several = client.completions.create(model=model, prompt=[PROMPT, "The old owl"], n=2, max_tokens=8, seed=1)
check([c.index for c in several.choices] == [0, 1, 2, 3], "two prompts with n=2 give four choices")
same = client.completions.create(model=model, prompt=[PROMPT, "The old owl"], n=2, max_tokens=8, seed=1)
check([c.text for c in same.choices] == [c.text for c in several.choices], "a seed makes sampling reproducible")

word = text.split()[2]
stopped = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0, stop=[word])
check(word not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop", f"stops before {word!r}")

scored = client.completions.create(model=model, prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3)
lp = scored.choices[0].logprobs
check(len(lp.tokens) == len(lp.token_logprobs) == len(lp.top_logprobs) == scored.usage.completion_tokens, "completion logprobs")
check(all(abs(max(top.values()) - chosen) < 1e-6 for top, chosen in zip(lp.top_logprobs, lp.token_logprobs)), "greedy takes the likeliest")

# chat
chat = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=32, temperature=0)
answer = chat.choices[0].message
check(answer.role == "assistant" and len(answer.content) > 10, f"chat: {answer.content!r}")
parts = list(
    client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=32, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )
)
check(parts[0].choices[0].delta.role == "assistant", "the first delta carries the role")
check("".join(p.choices[0].delta.content or "" for p in parts if p.choices) == answer.content, "streamed chat is the same")
check([p for p in parts if p.choices][-1].choices[0].finish_reason == chat.choices[0].finish_reason, "same finish reason")
check(parts[-1].usage.total_tokens == chat.usage.total_tokens, "same usage")

scored = client.chat.completions.create(
    model=model, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
)
entries = scored.choices[0].logprobs.content
check(len(entries) == 4 and all(len(e.top_logprobs) == 2 for e in entries), "chat logprobs")
check(b"".join(bytes(e.bytes) for e in entries).decode() == scored.choices[0].message.content, "token bytes spell the content")

three = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, n=3, seed=5)
check(len({c.index for c in three.choices}) == 3, "n=3")

conversation = [*MESSAGES, chat.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "Go on."}]}]
more = client.chat.completions.create(
    model=model, messages=conversation, max_tokens=4, stop=None, temperature=None, seed=None, stream_options=None, tools=[],
    response_format={"type": "text"},
)
check(more.usage.prompt_tokens > chat.usage.prompt_tokens, "an answer goes back in as a message; nulls and empty lists are nothing")

raw = client.chat.completions.with_raw_response.create(model=model, messages=MESSAGES, max_tokens=4)
check(raw.headers["x-baton-path"] == "remote-prefill", "the prompt was prefilled remotely")
check(raw.headers.get("x-request-id"), "answers carry a request id")

# errors
refused(openai.NotFoundError, 404, None, lambda: client.completions.create(model="nonesuch", prompt="x"))
refused(openai.BadRequestError, 400, "temperature", lambda: client.completions.create(model=model, prompt="x", temperature=9))
refused(openai.BadRequestError, 400, "top_p", lambda: client.completions.create(model=model, prompt="x", top_p=-1))
refused(openai.BadRequestError, 400, "n", lambda: client.completions.create(model=model, prompt="x", n=1000))
refused(openai.BadRequestError, 400, None, lambda: client.completions.create(model=model, prompt="word " * 9000))
refused(openai.BadRequestError, 400, "messages", lambda: client.chat.completions.create(model=model, messages=[]))
refused(
    openai.BadRequestError, 400, "tools",
    lambda: client.chat.completions.create(
        model=model, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
    ),
)
print("all checks passed")

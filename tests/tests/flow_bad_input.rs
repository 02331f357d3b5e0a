//! Bad input to real processes: requests that a client may get wrong, and model directories that can't be served. Each is
//! refused with an error that names what is wrong, and nothing is lost by it.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use system_tests::cluster::{Cluster, PodSpec, path_of, wait};
use system_tests::{http, repo};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Bytes that a proxy accepts by default.
const BODY_BYTES_MAX: usize = 4 << 20;

/// A prefill and a decode worker, and who they were when they became ready.
struct Pair {
    cluster: Cluster,
    epochs: Vec<Value>,
}

impl Pair {
    fn start(flags: &[(&str, &str)]) -> Result<Self> {
        let with_flags = |spec: PodSpec| flags.iter().fold(spec, |spec, (name, value)| spec.worker_flag(name, value));
        let cluster = Cluster::start(&[with_flags(PodSpec::new("prefill")), with_flags(PodSpec::new("decode"))])?;
        let epochs = cluster.pods.iter().map(|pod| Ok(pod.status()?["epoch"].clone())).collect::<Result<_>>()?;
        Ok(Pair { cluster, epochs })
    }

    fn address(&self) -> String {
        self.cluster.pods[1].proxy_address()
    }

    /// The same processes as at the start hold nothing any more and serve on.
    fn lost_nothing(&mut self) -> Result<()> {
        for (pod, epoch) in self.cluster.pods.iter_mut().zip(&self.epochs) {
            ensure!(pod.worker.try_wait()?.is_none() && pod.proxy.try_wait()?.is_none(), "{} ended", pod.address);
            ensure!(pod.status()?["epoch"] == *epoch, "{} has restarted", pod.address);
        }
        let pods = &self.cluster.pods;
        wait("no block is held and nothing runs", || {
            let loads = pods.iter().map(|pod| Ok(pod.status()?["load"].clone())).collect::<Result<Vec<_>>>()?;
            let idle = |load: &Value| ["kv_blocks_used", "running", "waiting"].iter().all(|count| load[count] == 0);
            Ok(loads.iter().all(idle))
        })?;
        let body = json!({"model": "tiny", "prompt": "Once upon a time", "max_tokens": 4, "ignore_eos": true});
        // A machine that is busy with other tests may be late with a status, so that a worker is passed over for a moment.
        wait("both phases serve", || {
            let answer = http::post(&self.address(), COMPLETIONS, &body)?;
            assert_eq!(answer.status, 200);
            let path = path_of(&answer);
            assert_eq!(answer.json()?["usage"]["completion_tokens"], 4);
            Ok(path == "remote-prefill")
        })
    }
}

/// Checks an error's status, code and parameter, and that its body has exactly OpenAI's shape.
fn refused(what: &str, answer: http::Answer, status: u16, code: &str, param: Option<&str>) -> Result<()> {
    assert_eq!(answer.header("content-type"), Some("application/json"), "{what}");
    let found = answer.status;
    let body = answer.json().context(what.to_owned())?;
    let error = openai_error(&body).with_context(|| format!("{what}: {body}"))?;
    assert_eq!((found, &error["code"], &error["param"]), (status, &json!(code), &json!(param)), "{what}: {body}");
    Ok(())
}

fn openai_error(body: &Value) -> Result<&Value> {
    let error = &body["error"];
    let names: Vec<&str> = error.as_object().context("no error")?.keys().map(String::as_str).collect();
    ensure!(names == ["message", "type", "param", "code"], "other fields");
    ensure!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "no message");
    ensure!(error["type"] == "invalid_request_error", "another type");
    Ok(error)
}

#[test]
fn each_bad_request_is_refused_by_name_and_nothing_is_lost() -> Result<()> {
    let mut pair = Pair::start(&[])?;
    let address = pair.address();
    let check = |path: &str, body: &[u8], status: u16, code: &str, param: Option<&str>| {
        let what = format!("{path} {}", String::from_utf8_lossy(&body[..body.len().min(120)]));
        refused(&what, http::send("POST", &address, path, &[], body)?, status, code, param)
    };

    // What is no JSON, or none that can be trusted.
    let nested = format!(r#"{{"model":"tiny","prompt":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    for body in [
        &b"{\"model\": \"tiny\", \"prompt\": "[..],
        b"model=tiny",
        b"[]",
        b"\"tiny\"",
        b"{\"model\":\"tiny\",\"prompt\":\"\xff\xfe\"}",
        b"\xef\xbb\xbf{\"model\":\"tiny\",\"prompt\":\"a\"}",
        b"{\"model\":\"tiny\",\"prompt\":\"\\ud800\"}",
        b"{\"model\":\"tiny\",\"prompt\":\"a\",\"temperature\":NaN}",
        b"{\"model\":\"tiny\",\"prompt\":\"a\",\"temperature\":1e999}",
        b"{\"model\":\"tiny\",\"prompt\":\"a\",\"max_tokens\":1,\"max_tokens\":2}",
        b"{\"model\":\"tiny\",\"prompt\":\"a\"} {}",
        nested.as_bytes(),
    ] {
        check(COMPLETIONS, body, 400, "malformed_json", None)?;
    }

    // Each sampling parameter outside its range on either side, or of another type.
    let completion = |name: &str, value: Value| {
        let mut body = json!({"model": "tiny", "prompt": "a", "max_tokens": 1});
        body[name] = value;
        body.to_string()
    };
    for (name, value) in [
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.1)),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("top_k", json!(-2)),
        ("top_k", json!(1_u64 << 32)),
        ("min_p", json!(-0.1)),
        ("min_p", json!(1.1)),
        ("repetition_penalty", json!(0)),
        ("repetition_penalty", json!(100.1)),
        ("presence_penalty", json!(-2.1)),
        ("presence_penalty", json!(2.1)),
        ("frequency_penalty", json!(-2.1)),
        ("frequency_penalty", json!(2.1)),
        ("logprobs", json!(-1)),
        ("logprobs", json!(21)),
        ("n", json!(0)),
        ("n", json!(9)),
        ("n", json!(u64::MAX)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(u64::MAX)),
        ("prompt", json!([])),
        ("prompt", json!(vec!["a"; 65])),
        ("stop", json!(vec!["a"; 17])),
        ("cache_salt", json!("")),
    ] {
        check(COMPLETIONS, completion(name, value).as_bytes(), 400, "invalid_value", Some(name))?;
    }
    for (name, value, param) in [
        ("stop", json!([""]), "stop[0]"),
        ("stop", json!("a".repeat(1025)), "stop"),
        ("logit_bias", json!({"5": 101}), "logit_bias.5"),
        ("logit_bias", json!({"99999": 1}), "logit_bias"),
        ("stop_token_ids", json!([99999]), "stop_token_ids"),
        ("prompt", json!([[5, 99999]]), "prompt[0][1]"),
        ("prompt", json!([[5], []]), "prompt[1]"),
        ("stream_options", json!({"include_usage": true}), "stream_options"),
    ] {
        check(COMPLETIONS, completion(name, value).as_bytes(), 400, "invalid_value", Some(param))?;
    }
    for name in ["temperature", "top_p", "top_k", "min_p", "n", "max_tokens", "logprobs", "seed", "stream", "echo"] {
        check(COMPLETIONS, completion(name, json!("two")).as_bytes(), 400, "invalid_type", Some(name))?;
    }
    for (name, value) in [("logit_bias", json!({"1.5": 1})), ("logit_bias", json!([])), ("stop", json!(3))] {
        check(COMPLETIONS, completion(name, value).as_bytes(), 400, "invalid_type", Some(name))?;
    }

    // What is not there, not served, or not known.
    for (name, value, code) in [
        ("suffix", json!("the end"), "unsupported_parameter"),
        ("best_of", json!(2), "unsupported_parameter"),
        ("guided_json", json!({}), "unsupported_parameter"),
        ("tempurature", json!(1), "unknown_parameter"),
    ] {
        check(COMPLETIONS, completion(name, value).as_bytes(), 400, code, Some(name))?;
    }
    check(COMPLETIONS, completion("model", json!("gpt-9")).as_bytes(), 404, "model_not_found", Some("model"))?;
    check(COMPLETIONS, b"{\"prompt\":\"a\"}", 400, "missing_required_parameter", Some("model"))?;
    check(COMPLETIONS, b"{\"model\":\"tiny\"}", 400, "missing_required_parameter", Some("prompt"))?;
    let long = "word ".repeat(3000);
    check(COMPLETIONS, completion("prompt", json!(long)).as_bytes(), 400, "context_length_exceeded", Some("prompt"))?;
    check(
        COMPLETIONS,
        completion("max_tokens", json!(2048)).as_bytes(),
        400,
        "context_length_exceeded",
        Some("prompt"),
    )?;

    // Chats.
    for (messages, code, param) in [
        (json!([]), "invalid_value", "messages"),
        (json!("hi"), "invalid_type", "messages"),
        (json!(["hi"]), "invalid_type", "messages[0]"),
        (json!([{"role": "robot", "content": "hi"}]), "invalid_value", "messages[0].role"),
        (json!([{"content": "hi"}]), "missing_required_parameter", "messages[0].role"),
        (json!([{"role": "user"}]), "missing_required_parameter", "messages[0].content"),
        (
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        (json!([{"role": "tool", "content": "hi"}]), "unsupported_parameter", "messages[0].role"),
        (json!([{"role": "user", "content": "hi", "mood": "good"}]), "unknown_parameter", "messages[0].mood"),
        (json!([{"role": "user", "content": long}]), "context_length_exceeded", "messages"),
    ] {
        check(CHAT, json!({"model": "tiny", "messages": messages}).to_string().as_bytes(), 400, code, Some(param))?;
    }
    for (name, value) in [
        ("tools", json!([{"type": "function", "function": {"name": "f"}}])),
        ("response_format", json!({"type": "json_object"})),
    ] {
        let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
        body[name] = value;
        check(CHAT, body.to_string().as_bytes(), 400, "unsupported_parameter", Some(name))?;
    }
    pair.lost_nothing()
}

#[test]
fn what_is_wrong_about_the_http_of_a_request_is_said_in_openais_shape() -> Result<()> {
    let mut pair = Pair::start(&[])?;
    let address = pair.address();
    let body = json!({"model": "tiny", "prompt": "a", "max_tokens": 1}).to_string();
    let check = |method: &str, path: &str, headers: &[(&str, &str)], body: &str, status: u16, code: &str| {
        let answer = http::send(method, &address, path, headers, body)?;
        refused(&format!("{method} {path} {headers:?}"), answer, status, code, None)
    };
    // The whole body is sent before the answer is read, as clients do: it must not be lost with the connection.
    for bytes in [BODY_BYTES_MAX + 1, 8 * BODY_BYTES_MAX] {
        check("POST", COMPLETIONS, &[], &"a".repeat(bytes), 413, "request_too_large")?;
    }
    for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"] {
        check("POST", COMPLETIONS, &[("content-type", kind)], &body, 415, "unsupported_media_type")?;
    }
    check("POST", COMPLETIONS, &[("content-encoding", "gzip")], &body, 415, "unsupported_media_type")?;
    check("GET", COMPLETIONS, &[], "", 405, "method_not_supported")?;
    check("DELETE", "/v1/models", &[], "", 405, "method_not_supported")?;
    check("POST", "/v1/embeddings", &[], &body, 404, "unknown_url")?;
    check("POST", "/v1/completions/", &[], &body, 404, "unknown_url")?;
    check("POST", COMPLETIONS, &[], "", 411, "length_required")?;
    check("POST", COMPLETIONS, &[("content-length", "0")], "", 400, "malformed_json")?;
    let model = http::get(&address, "/v1/models/org%2Fother")?;
    refused("another model", model, 404, "model_not_found", Some("model"))?;

    // The HTTP library itself refuses these, before there is a request: by status alone. They have no body, since it closes
    // the connection without reading one.
    for headers in [vec![("x-long", "x".repeat(17 << 10))], vec![("x-many", "x".to_owned()); 150]] {
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        assert_eq!(http::send("POST", &address, COMPLETIONS, &headers, "")?.status, 431);
    }
    // Nor can a client reach what proxies say to each other.
    for path in ["/internal/render", "/internal/prefill", "/internal/decode"] {
        let answer = http::send("POST", &address, path, &[], &body)?;
        refused(path, answer, 401, "leg_unauthorized", Some("x-baton-leg"))?;
    }
    pair.lost_nothing()
}

/// Bodies in one run of the test below: a few seconds' worth.
const MUTATIONS: u32 = 400;

#[test]
fn mutated_requests_never_hang_nor_end_a_worker() -> Result<()> {
    // A short model length bounds what a mutation that happens to be right can ask for.
    let mut pair = Pair::start(&[("--max-model-length", "96")])?;
    let address = pair.address();
    let mut random = Random(0x0bad_5eed);
    let (mut served, mut refusals) = (0, 0);
    for number in 0..MUTATIONS {
        let (path, body) = mutation(&mut random);
        let what = || format!("mutation {number} of {path}: {}", String::from_utf8_lossy(&body));
        let answer = http::send("POST", &address, path, &[], &body).with_context(what)?;
        match answer.status {
            // Every other answer is left unread: the client hangs up.
            200 if number % 2 == 0 => served += 1,
            200 => {
                let text = answer.text().with_context(what)?;
                ensure!(!text.contains("\"error\""), "{}: {text}", what());
                served += 1;
            }
            400..500 => {
                let body = answer.json().with_context(what)?;
                openai_error(&body).with_context(|| format!("{}: {body}", what()))?;
                refusals += 1;
            }
            status => anyhow::bail!("{}: {status} {}", what(), answer.text()?),
        }
    }
    ensure!(served > MUTATIONS / 20 && refusals > MUTATIONS / 4, "{served} served, {refusals} refused: too much alike");
    pair.lost_nothing()
}

/// SplitMix64: the same mutations in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }

    fn one_of<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }
}

/// A right request with one to three changes: to its bytes, or to the values of its fields.
fn mutation(random: &mut Random) -> (&'static str, Vec<u8>) {
    let completion = r#"{"model":"tiny","prompt":["Once upon","é🦊"],"max_tokens":3,"temperature":0.5,"top_k":4,"top_p":0.9,"n":2,"stop":["fox"],"logprobs":2,"logit_bias":{"7":-1.5},"seed":3,"stream":true,"stream_options":{"include_usage":true}}"#;
    let chat = r#"{"model":"tiny","messages":[{"role":"system","content":"Be kind."},{"role":"user","content":[{"type":"text","text":"Hello"}]}],"max_tokens":3,"min_p":0.1,"logprobs":true,"top_logprobs":2,"repetition_penalty":1.1,"presence_penalty":-0.5,"stop_token_ids":[9],"chat_template_kwargs":{"x":1},"seed":-1}"#;
    let values = [
        "null",
        "true",
        "0",
        "-1",
        "1",
        "3.5",
        "1e308",
        "1e-308",
        "-0.0",
        "18446744073709551615",
        "\"\"",
        "\"tiny\"",
        "[]",
        "{}",
        "[null]",
        "[[]]",
        "[[1,2,3]]",
        "{\"a\":{}}",
        "\"\\u0000\"",
        "\"\\ud83e\\udd8a\"",
        "[0,1,2]",
    ];
    let bytes = ["\"", "{", "}", "[", "]", ",", ":", "\\", "\u{0}", "e", "-", "9", "é", "\u{202e}", "{{", "{%", "<s>"];
    let (path, right) = if random.below(2) == 0 { (COMPLETIONS, completion) } else { (CHAT, chat) };
    if random.below(2) == 0 {
        let mut body: Value = serde_json::from_str(right).expect("right JSON");
        for _ in 0..=random.below(3) {
            let field = random.below(body.as_object().map_or(1, serde_json::Map::len));
            let fields = body.as_object_mut().expect("an object");
            // Absence is what most fields can bear, and what then remains is served.
            let value = if random.below(2) == 0 { "null" } else { random.one_of(&values) };
            let value = serde_json::from_str(value).expect("values are JSON");
            if let Some(field) = fields.values_mut().nth(field) {
                *field = value;
            }
        }
        return (path, body.to_string().into_bytes());
    }
    let mut body = right.as_bytes().to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(body.len());
        let end = (at + random.below(12)).min(body.len());
        match random.below(5) {
            0 => body[at] ^= 1 << random.below(8),
            1 => drop(body.drain(at..end)),
            2 => drop(body.splice(at..at, body[at..end].to_vec())),
            3 => drop(body.splice(at..at, random.one_of(&bytes).bytes())),
            _ => drop(body.splice(at..end, random.one_of(&values).bytes())),
        }
        if body.is_empty() {
            break;
        }
    }
    (path, body)
}

/// Ways to damage a copy of the demo model's directory, and what the worker must then say.
#[test]
fn a_model_that_cannot_be_served_ends_the_worker_with_what_is_wrong() -> Result<()> {
    type Damage = fn(&Path) -> Result<()>;
    let cases: [(&str, Damage, &[&str]); 11] = [
        ("a tensor is missing", |dir| rename_tensor(dir, "model.norm.weight"), &["model.norm.weight"]),
        (
            "a tensor has another shape",
            |dir| transpose_tensor(dir, "model.layers.0.mlp.up_proj.weight"),
            &["model.layers.0.mlp.up_proj.weight", "expected", "found"],
        ),
        (
            "the weights are truncated",
            |dir| Ok(std::fs::File::options().write(true).open(dir.join("model.safetensors"))?.set_len(100_000)?),
            &["model.safetensors", "truncated"],
        ),
        ("the weights are missing", |dir| Ok(std::fs::remove_file(dir.join("model.safetensors"))?), &["safetensors"]),
        (
            "the architecture is not supported",
            |dir| {
                edit_json(dir, "config.json", |config| {
                    config["architectures"] = json!(["GPT2LMHeadModel"]);
                    config["model_type"] = json!("gpt2");
                })
            },
            &["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"],
        ),
        ("the configuration is missing", |dir| Ok(std::fs::remove_file(dir.join("config.json"))?), &["config.json"]),
        (
            "the configuration has a wrong type",
            |dir| edit_json(dir, "config.json", |config| config["num_hidden_layers"] = json!("two")),
            &["config.json", "line 1 column"],
        ),
        ("the configuration is no JSON", |dir| Ok(std::fs::write(dir.join("config.json"), "{")?), &["config.json"]),
        ("the tokenizer is broken", |dir| Ok(std::fs::write(dir.join("tokenizer.json"), "{")?), &["tokenizer.json"]),
        ("the tokenizer is missing", |dir| Ok(std::fs::remove_file(dir.join("tokenizer.json"))?), &["tokenizer.json"]),
        (
            "the chat template is broken",
            |dir| edit_json(dir, "tokenizer_config.json", |config| config["chat_template"] = json!("{% for %}")),
            &["chat template"],
        ),
    ];
    for (what, damage, says) in cases {
        let dir = repo::copy_of_demo_model()?;
        damage(dir.path())?;
        ends_with(what, dir.path(), says)?;
    }
    let file = tempfile::NamedTempFile::new()?;
    ends_with(
        "the directory is a file",
        file.path(),
        &[&file.path().to_string_lossy(), "not a directory", "config.json"],
    )?;
    ends_with("there is no directory", Path::new("/no/such/model"), &["/no/such/model", "not a directory"])
}

/// Starts a worker on `model` and checks that it ends unsuccessfully, having said all of `says`.
fn ends_with(what: &str, model: &Path, says: &[&str]) -> Result<()> {
    let mut worker = Command::new(repo::binary("baton-worker"))
        .args(["--role", "decode", "--served-model-name", "tiny", "--revision", "r1"])
        .args(["--host", "127.0.0.1", "--port", "0", "--kv-cache-bytes", "33554432", "--model"])
        .arg(model)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let ended = wait(&format!("{what}: the worker ends"), || Ok(worker.try_wait()?.is_some()));
    // Ended already is fine; one that serves must not outlive the test.
    let _ = worker.kill();
    let status = worker.wait()?;
    let mut said = String::new();
    worker.stderr.take().context("it is piped")?.read_to_string(&mut said)?;
    ended.with_context(|| said.clone())?;
    assert_eq!(status.code(), Some(1), "{what}: {said}");
    let last = said.lines().last().unwrap_or_default();
    for word in says {
        assert!(last.contains(word), "{what}: {word:?} is not in: {last}");
    }
    assert!(!said.contains("panicked"), "{what}: {said}");
    Ok(())
}

fn edit_json(dir: &Path, file: &str, edit: impl FnOnce(&mut Value)) -> Result<()> {
    let path = dir.join(file);
    let mut json = serde_json::from_slice(&std::fs::read(&path)?)?;
    edit(&mut json);
    Ok(std::fs::write(path, json.to_string())?)
}

/// Gives a tensor another name.
fn rename_tensor(dir: &Path, name: &str) -> Result<()> {
    edit_header(dir, |header| {
        let tensor = header.as_object_mut().and_then(|tensors| tensors.remove(name)).context("the tensor is there")?;
        header[format!("{name}.renamed")] = tensor;
        Ok(())
    })
}

/// Exchanges a matrix's dimensions: as many bytes, another shape.
fn transpose_tensor(dir: &Path, name: &str) -> Result<()> {
    edit_header(dir, |header| {
        let shape = header[name]["shape"].as_array_mut().context("the tensor is there")?;
        ensure!(shape.len() == 2 && shape[0] != shape[1], "the tensor is a matrix and not square");
        shape.swap(0, 1);
        Ok(())
    })
}

/// Edits the header of the weights: 8 bytes of length, then JSON, then the tensors' bytes.
fn edit_header(dir: &Path, edit: impl FnOnce(&mut Value) -> Result<()>) -> Result<()> {
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path)?;
    let (length, rest) = bytes.split_first_chunk::<8>().context("the file has a header")?;
    let (header, tensors) = rest.split_at(usize::try_from(u64::from_le_bytes(*length))?);
    let mut header: Value = serde_json::from_slice(header)?;
    edit(&mut header)?;
    let header = header.to_string();
    let length = (header.len() as u64).to_le_bytes();
    Ok(std::fs::write(path, [&length, header.as_bytes(), tensors].concat())?)
}

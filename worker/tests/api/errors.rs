//! What a wrong request is answered: status, code and parameter, in OpenAI's error body.

use crate::server::{Answer, Server};
use serde_json::{Value, json};

/// Checks status, code and parameter of an error.
fn check(answer: &Answer, status: u16, code: &str, param: Value) {
    let error = &answer.json()["error"];
    assert_eq!(
        (answer.status.as_u16(), &error["code"], &error["param"]),
        (status, &json!(code), &param),
        "{}",
        answer.text
    );
    assert_eq!(error["type"], if status < 500 { "invalid_request_error" } else { "server_error" });
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    assert_eq!(answer.header("content-type"), "application/json");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mistake_is_named() {
    let server = Server::ready().await;
    let messages = json!([{"role": "user", "content": "Hello"}]);
    let long = "word ".repeat(3000);
    let cases = [
        ("/v1/chat/completions", json!({"messages": messages}), 400, "missing_required_parameter", "model"),
        ("/v1/chat/completions", json!({"model": "tiny"}), 400, "missing_required_parameter", "messages"),
        ("/v1/chat/completions", json!({"model": "gpt-9", "messages": messages}), 404, "model_not_found", "model"),
        ("/v1/chat/completions", json!({"model": "tiny", "messages": []}), 400, "invalid_value", "messages"),
        (
            "/v1/chat/completions",
            json!({"model": "tiny", "messages": messages, "temperature": 3}),
            400,
            "invalid_value",
            "temperature",
        ),
        ("/v1/chat/completions", json!({"model": "tiny", "messages": messages, "n": 0}), 400, "invalid_value", "n"),
        ("/v1/chat/completions", json!({"model": "tiny", "messages": messages, "n": "two"}), 400, "invalid_type", "n"),
        (
            "/v1/chat/completions",
            json!({"model": "tiny", "messages": messages, "tools": [{}]}),
            400,
            "unsupported_parameter",
            "tools",
        ),
        (
            "/v1/chat/completions",
            json!({"model": "tiny", "messages": messages, "wat": 1}),
            400,
            "unknown_parameter",
            "wat",
        ),
        (
            "/v1/chat/completions",
            json!({"model": "tiny", "messages": [{"role": "user", "content": long}]}),
            400,
            "context_length_exceeded",
            "messages",
        ),
        (
            "/v1/completions",
            json!({"model": "tiny", "prompt": "a", "max_tokens": 2048}),
            400,
            "context_length_exceeded",
            "prompt",
        ),
        ("/v1/completions", json!({"model": "tiny", "prompt": [[5, 99999]]}), 400, "invalid_value", "prompt[0][1]"),
        (
            "/v1/completions",
            json!({"model": "tiny", "prompt": "a", "suffix": "b"}),
            400,
            "unsupported_parameter",
            "suffix",
        ),
    ];
    for (path, body, status, code, param) in cases {
        check(&server.post(path, &body).await, status, code, json!(param));
        // The same mistake leaves as the same error from rendering, before any leg is sent.
        let endpoint = if path.contains("chat") { "chat" } else { "completions" };
        let rendered = server.post("/internal/render", &json!({"endpoint": endpoint, "body": body})).await;
        check(&rendered, status, code, json!(param));
    }
    let numbers =
        server.post("/v1/completions", &json!({"model": "tiny", "prompt": [[5, 6, 7]], "max_tokens": 2046})).await;
    let message = numbers.json()["error"]["message"].take();
    for number in ["2048", "3 in its prompt", "2046"] {
        assert!(message.as_str().is_some_and(|message| message.contains(number)), "{message}");
    }
    assert!(
        server
            .get("/metrics")
            .await
            .text
            .contains(r#"baton_worker_errors_total{code="model_not_found",role="prefill-decode"} 2"#)
    );
    server.is_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_json_is_located() {
    let server = Server::ready().await;
    let answer = server.post_text("/v1/completions", "{\"model\": \"tiny\",\n \"prompt\": }").await;
    check(&answer, 400, "malformed_json", Value::Null);
    assert!(answer.text.contains("line 2, column 12"), "{}", answer.text);
    check(&server.post_text("/v1/completions", "").await, 400, "malformed_json", Value::Null);
    check(&server.post_text("/v1/completions", "[1]").await, 400, "invalid_type", json!("the request body"));
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_methods_and_sizes_have_their_statuses() {
    let server = Server::ready().await;
    check(&server.get("/v1/nothing").await, 404, "unknown_url", Value::Null);
    check(&server.get("/v1/completions").await, 405, "method_not_supported", Value::Null);
    let huge = format!(r#"{{"model":"tiny","prompt":"{}"}}"#, "a".repeat(4 << 20));
    check(&server.post_text("/v1/completions", &huge).await, 413, "request_too_large", Value::Null);
    check(
        &server.post_text("/internal/decode", "{\"prompts\": \"secret\"}").await,
        400,
        "malformed_request",
        Value::Null,
    );
    let answer = server.post_text("/internal/decode", "{\"prompts\": \"secret\"}").await;
    assert!(!answer.text.contains("secret"), "no error repeats a prompt: {}", answer.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_refuses_what_is_not_its_role() {
    let decode = Server::ready_with("--role decode").await;
    check(&decode.post("/internal/prefill", &json!({})).await, 421, "wrong_role", Value::Null);

    let keys = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(keys.path(), crate::legs::public_key()).expect("the key is written");
    let key = keys.path().display();
    let prefill = Server::ready_with(&format!("--role prefill --proxy-public-key-file {key}")).await;
    for path in ["/v1/chat/completions", "/v1/completions", "/internal/decode"] {
        let answer = prefill.post(path, &json!({"model": "tiny", "prompt": "a"})).await;
        check(&answer, 421, "wrong_role", Value::Null);
    }
}

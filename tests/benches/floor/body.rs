//! What the floor does to bodies: a document in memory, a field set, the document written again.

use anyhow::{Context, Result};
use hyper::body::Bytes;
use serde_json::{Map, Value, json};

/// A body, which is an object in every contract.
pub(crate) type Document = Map<String, Value>;

pub(crate) fn parse(body: &[u8]) -> Result<Document> {
    serde_json::from_slice(body).context("the body is no JSON object")
}

pub(crate) fn write(document: &Document) -> Result<Bytes> {
    Ok(serde_json::to_vec(document)?.into())
}

/// The body with which prefill computes the prompt and one token, and keeps the KV cache for somebody.
pub(crate) fn for_prefill(document: &Document) -> Result<Bytes> {
    let mut document = document.clone();
    document.remove("stream_options");
    document.insert("stream".to_owned(), json!(false));
    document.insert("max_tokens".to_owned(), json!(1));
    if let Some(cap) = document.get_mut("max_completion_tokens") {
        *cap = json!(1);
    }
    let transfer = json!({
        "do_remote_decode": true,
        "do_remote_prefill": false,
        "remote_engine_id": null,
        "remote_block_ids": null,
        "remote_host": null,
        "remote_port": null,
    });
    document.insert(TRANSFER.to_owned(), transfer);
    write(&document)
}

/// Gives decode what prefill has said about the KV cache, as it was said.
pub(crate) fn hand_over(document: &mut Document, mut answer: Document) {
    if let Some(transfer) = answer.get_mut(TRANSFER) {
        document.insert(TRANSFER.to_owned(), transfer.take());
    }
}

/// Tells both engines where they meet.
pub(crate) fn meet(document: &mut Document, host: &str, port: Option<u16>, room: u64) {
    document.insert("bootstrap_host".to_owned(), json!(host));
    document.insert("bootstrap_port".to_owned(), json!(port));
    document.insert("bootstrap_room".to_owned(), json!(room));
}

const TRANSFER: &str = "kv_transfer_params";

//! KV messages between two workers: a fixed 64-byte header, then at most [`PAYLOAD_BYTES_MAX`] bytes.

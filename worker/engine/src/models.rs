//! Model architectures, written against [`Backend`](crate::backend::Backend).
//!
//! Know layers and shapes; the KV cache is passed in, never owned, so that it can be paged, shared and handed over.

pub mod decoder;

//! The OpenAI API as text: request bodies in, typed requests out; tokens in, response bodies out.
//!
//! Pure: no sockets, no clock, no engine. Requests are checked here and nowhere else; what a field means to the engine is
//! decided in `generate.rs`.

pub mod answer;
pub mod error;
mod fields;
mod json;
pub mod limits;
pub mod messages;
pub mod prompt;
pub mod request;
pub mod sampling;
mod unserved;

pub use error::RequestError;
pub use request::{Input, ModelFacts, Request};

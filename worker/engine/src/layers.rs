//! The parts of a decoder layer: each knows its weights' names and shapes, none knows the layer around it or owns a
//! cache.

pub mod attention;
pub mod linear;
pub mod mlp;

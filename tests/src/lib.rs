//! Support for tests of whole processes: finds the built binaries, starts `baton up`, speaks plain HTTP, cleans up.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod http;
pub mod repo;
pub mod up;

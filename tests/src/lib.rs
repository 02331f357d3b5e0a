//! Support for tests of whole processes: finds the built binaries, starts `baton up`, speaks plain HTTP, cleans up.
#![forbid(unsafe_code)]

pub mod api_faults;
pub mod cluster;
pub mod engines;
pub mod http;
pub mod kube;
pub mod mutate;
pub mod operator;
pub mod repo;
pub mod up;

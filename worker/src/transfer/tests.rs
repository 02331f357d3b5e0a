//! Handovers between a producer and a consumer over real sockets: what arrives, what is refused, and that nothing leaks when
//! anything at all goes wrong on the way.

mod faults;
mod fixture;
mod handover;
mod leases;
mod refusals;
mod relay;

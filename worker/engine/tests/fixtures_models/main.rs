//! Published model directories against what Hugging Face transformers computes from them (`scripts/fixtures`), and
//! broken ones.

mod bad_directories;
mod drive;
mod invariance;
mod numbers;
mod parts;
mod tokenizers;

//! A projection: one weight, possibly several of the checkpoint's matrices fused, and an optional bias.

use crate::backend::{Backend, BackendError};
use crate::loader::{Cut, LoadError, WeightReader};

/// `x * weight^T + bias`.
pub struct Linear<W> {
    weight: W,
    bias: Option<W>,
}

impl<W> Linear<W> {
    /// Takes the matrices that `cuts` name, one below the other, and their biases where `bias` says that there are
    /// some.
    ///
    /// # Errors
    /// When a weight is missing or not what it should be.
    pub fn load<B: Backend<Weight = W>>(
        reader: &mut WeightReader<'_, B>,
        cuts: &[Cut<'_>],
        bias: bool,
    ) -> Result<Self, LoadError> {
        Ok(Linear { weight: reader.matrix(cuts)?, bias: if bias { Some(reader.bias(cuts)?) } else { None } })
    }

    /// `[T, in] -> [T, out]`
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward<B: Backend<Weight = W>>(&self, backend: &B, x: &B::Buffer) -> Result<B::Buffer, BackendError> {
        backend.linear(x, &self.weight, self.bias.as_ref())
    }
}

//! A weight matrix whose product gives each row the same bits wherever in a batch it stands.
//!
//! Knows candle's product (the gemm crate underneath) and which of its paths agree. A product of one row takes gemm's
//! matrix-vector path, which sums in another order than the tiled kernel, and
//! nothing promises that two other heights agree. So rows are computed in tiles of fixed heights, the last one padded
//! with zeroes, and whatever goes beyond one row in one tile is used only if it gave the same bits for this shape on
//! this machine.
//!
//! gemm is called from an operation of our own rather than by way of candle's `matmul`, which asks how many CPUs there are at each
//! call: it reads `/proc/cpuinfo`, for longer than a small product takes and ever longer with more CPUs. The arguments, and so
//! the bits, are the same.

#![allow(unsafe_code)] // Calls gemm on raw pointers; the block has its argument.

use std::collections::HashMap;
use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp2, Device, Layout, Shape, Storage, Tensor};
use gemm::{Parallelism, gemm};
use rayon::prelude::*;

use crate::backend::BackendError;

/// The height that the others are compared with.
const HEIGHT: usize = 16;
/// For long inputs: the weight is streamed a quarter as often.
const TALL: usize = 64;
/// For decode steps of a few sequences: a quarter of the arithmetic.
const SHORT: usize = 4;

/// gemm's f32 kernels store 16 lanes at most; a multiple of it needs no packing of the weight at each call.
const LANES: usize = 16;

/// Elements above which the tall tile is not probed, as that costs 128 rows of arithmetic (17 GFLOP here, some tenths
/// of a second). Only an output head is this large, and it computes few rows a step.
const PROBE_ELEMENTS_MAX: usize = 1 << 26;

/// Places in a tile whose row is compared with the same row alone at the top of one: both ends and both sides of the
/// middle, where kernels of 4, 8 or 12 rows begin and end.
const PROBED_ROWS: [usize; 4] = [1, 7, 8, HEIGHT - 1];

/// `[outputs, inputs]` in f32, held transposed and padded to whole lanes, so that gemm reads it in place instead of
/// packing it at every call, which at a few rows takes longer than the product.
#[derive(Debug)]
pub struct Matrix {
    /// `[inputs, outputs rounded up to LANES]`
    transposed: Tensor,
    inputs: usize,
    outputs: usize,
    paths: Paths,
}

/// Which ways of tiling give a row the same bits as alone in a tile of `HEIGHT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Paths {
    /// Several rows may share a tile.
    shared: bool,
    /// Tiles of `TALL`.
    tall: bool,
    /// Tiles of `SHORT`.
    short: bool,
}

/// What has been found out, by shape.
#[derive(Debug, Default)]
pub(super) struct RowPaths(Mutex<HashMap<(usize, usize), Paths>>);

impl Matrix {
    pub(super) fn new(outputs: usize, inputs: usize, values: Vec<f32>, known: &RowPaths) -> Result<Self, BackendError> {
        if values.len() != outputs * inputs {
            return Err(super::shape("matrix", format!("[{outputs}, {inputs}]"), format!("{} values", values.len())));
        }
        let padded = outputs.next_multiple_of(LANES);
        let mut transposed = vec![0.0; inputs * padded];
        // A band of LANES inputs at a time, so that each cache line of `values` is read once.
        transposed.par_chunks_mut(padded * LANES).enumerate().for_each(|(band, rows)| {
            for output in 0..outputs {
                let from = &values[output * inputs + band * LANES..];
                rows.chunks_exact_mut(padded).zip(from).for_each(|(row, x)| row[output] = *x);
            }
        });
        drop(values);
        let transposed = Tensor::from_vec(transposed, (inputs, padded), &Device::Cpu)?;
        let alone = Paths { shared: false, tall: false, short: false };
        let mut matrix = Matrix { transposed, inputs, outputs, paths: alone };
        let mut known = known.0.lock().expect("no holder of this lock panics");
        matrix.paths = match known.get(&(outputs, inputs)) {
            Some(paths) => *paths,
            None => *known.entry((outputs, inputs)).or_insert(matrix.probe()?),
        };
        Ok(matrix)
    }

    /// Elements of an input row.
    pub(super) fn inputs(&self) -> usize {
        self.inputs
    }

    /// Elements of an output row.
    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Appends row `output` of the matrix: a token's embedding.
    pub(super) fn extend_row(&self, output: usize, values: &mut Vec<f32>) {
        let padded = self.outputs.next_multiple_of(LANES);
        with_values(&self.transposed, |transposed| {
            values.extend(transposed.chunks_exact(padded).map(|row| row[output]));
        });
    }

    /// `input * self^T`, `[rows, inputs] -> [rows, outputs]`.
    pub(super) fn product(&self, input: &[f32]) -> Result<Vec<f32>, BackendError> {
        let rows = input.len() / self.inputs;
        let mut output = vec![0.0; rows * self.outputs];
        let mut tiles = Vec::new();
        let (mut input_rest, mut output_rest) = (input, output.as_mut_slice());
        while !input_rest.is_empty() {
            let (height, taken) = self.paths.tile(input_rest.len() / self.inputs);
            let (tile_input, rest) = input_rest.split_at(taken * self.inputs);
            let (tile_output, rest_output) = output_rest.split_at_mut(taken * self.outputs);
            tiles.push((height, tile_input, tile_output));
            (input_rest, output_rest) = (rest, rest_output);
        }
        tiles.into_par_iter().try_for_each(|(height, input, output)| self.tile(height, input, output))?;
        Ok(output)
    }

    /// One tile: pads the input with zero rows to `height`.
    fn tile(&self, height: usize, input: &[f32], output: &mut [f32]) -> Result<(), BackendError> {
        let mut padded = Vec::with_capacity(height * self.inputs);
        padded.extend_from_slice(input);
        padded.resize(height * self.inputs, 0.0);
        let tile = Tensor::from_vec(padded, (height, self.inputs), &Device::Cpu)?;
        let product = tile.apply_op2_no_bwd(&self.transposed, &Product)?; // [height, outputs rounded up]
        let padded = self.outputs.next_multiple_of(LANES);
        with_values(&product, |product| {
            for (to, from) in output.chunks_exact_mut(self.outputs).zip(product.chunks_exact(padded)) {
                to.copy_from_slice(&from[..self.outputs]);
            }
        });
        Ok(())
    }

    /// Computes the same rows in every way and keeps the ways that agree to the bit.
    fn probe(&self) -> Result<Paths, BackendError> {
        // Any values without structure do: the order of a sum shows in nearly every output.
        let mut state = 0x9e37_79b9_u32;
        let rows: Vec<f32> = (0..TALL * self.inputs)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        let in_tiles_of = |height: usize, rows: &[f32]| -> Result<Vec<u32>, BackendError> {
            let mut output = vec![0.0; rows.len() / self.inputs * self.outputs];
            let tiles = rows.chunks(height * self.inputs).zip(output.chunks_mut(height * self.outputs));
            for (input, output) in tiles {
                self.tile(height, input, output)?;
            }
            Ok(output.into_iter().map(f32::to_bits).collect())
        };
        let tile = &rows[..HEIGHT * self.inputs];
        let together = in_tiles_of(HEIGHT, tile)?;
        let mut shared = true;
        for row in PROBED_ROWS {
            let mut alone = vec![0.0; self.outputs];
            self.tile(HEIGHT, &tile[row * self.inputs..(row + 1) * self.inputs], &mut alone)?;
            let same = &together[row * self.outputs..(row + 1) * self.outputs];
            shared &= alone.iter().zip(same).all(|(x, bits)| x.to_bits() == *bits);
        }
        let short = shared && in_tiles_of(SHORT, tile)? == together;
        let tall = shared
            && self.inputs * self.outputs <= PROBE_ELEMENTS_MAX
            && in_tiles_of(TALL, &rows)? == in_tiles_of(HEIGHT, &rows)?;
        Ok(Paths { shared, tall, short })
    }
}

impl Paths {
    /// Height of the next tile and how many of the `rest` rows go into it.
    fn tile(self, rest: usize) -> (usize, usize) {
        if !self.shared {
            (HEIGHT, 1)
        } else if self.tall && rest >= TALL {
            (TALL, TALL)
        } else if self.short && rest <= SHORT {
            (SHORT, rest)
        } else {
            (HEIGHT, rest.min(HEIGHT))
        }
    }
}

/// `[m, k] * [k, n] -> [m, n]` of contiguous f32 tensors, on the threads of the present rayon pool.
struct Product;

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        lhs: &CpuStorage,
        lhs_layout: &Layout,
        rhs: &CpuStorage,
        rhs_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let ((m, k), (inner, n)) = (lhs_layout.shape().dims2()?, rhs_layout.shape().dims2()?);
        let (lhs, rhs) = (contiguous(lhs, lhs_layout)?, contiguous(rhs, rhs_layout)?);
        if inner != k {
            candle_core::bail!("a product of rows of {k} and {inner} columns");
        }
        let mut product = vec![0.0f32; m * n];
        let stride = |elements: usize| isize::try_from(elements).expect("a row is a part of a slice");
        // SAFETY: `lhs` and `rhs` are slices of m k and k n elements (checked by `contiguous`), `product` has m n, all three
        // row-major as the strides say; nobody else has `product`.
        unsafe {
            gemm(
                m,
                n,
                k,
                product.as_mut_ptr(),
                1,
                stride(n),
                false,
                lhs.as_ptr(),
                1,
                stride(k),
                rhs.as_ptr(),
                1,
                stride(n),
                0.0,
                1.0,
                false,
                false,
                false,
                Parallelism::Rayon(rayon::current_num_threads()),
            );
        }
        Ok((CpuStorage::F32(product), Shape::from((m, n))))
    }
}

/// The elements of a contiguous f32 tensor, as many as its shape says.
fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a product of a tensor that is not contiguous"),
    }
}

/// Reads a contiguous f32 tensor in place.
fn with_values<R>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> R) -> R {
    let (storage, layout) = tensor.storage_and_layout();
    debug_assert!(layout.is_contiguous() && layout.start_offset() == 0, "only whole tensors are read in place");
    match &*storage {
        Storage::Cpu(storage) => read(storage.as_slice().expect("the tensors here are f32")),
        Storage::Cuda(_) | Storage::Metal(_) => unreachable!("the tensors here are made on the CPU"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(count).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

    const SHAPES: [(usize, usize); 9] =
        [(1, 1), (3, 2), (199, 32), (16, 48), (7, 300), (131, 1100), (576, 192), (1056, 64), (33, 2049)];

    #[test]
    fn a_row_has_the_same_bits_at_every_place_of_every_batch() {
        let known = RowPaths::default();
        for (outputs, inputs) in SHAPES {
            let matrix = Matrix::new(outputs, inputs, values(outputs * inputs, 1), &known).expect("fits");
            let input = values(150 * inputs, 2);
            let all = matrix.product(&input).expect("fits");
            for rows in [1, 2, 3, 5, 16, 17, 64, 70] {
                for start in [0, 1, 15, 79] {
                    let some = matrix.product(&input[start * inputs..(start + rows) * inputs]).expect("fits");
                    let same = &all[start * outputs..(start + rows) * outputs];
                    assert_eq!(bits(&some), bits(same), "{outputs} x {inputs}, rows {start}..{}", start + rows);
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_does_not_show() {
        let known = RowPaths::default();
        let (outputs, inputs) = (1536, 512);
        let matrix = Matrix::new(outputs, inputs, values(outputs * inputs, 1), &known).expect("fits");
        let input = values(70 * inputs, 2);
        let product = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            bits(&pool.install(|| matrix.product(&input)).expect("fits"))
        };
        let one = product(1);
        assert_eq!(one, product(2));
        assert_eq!(one, product(5));
    }

    #[test]
    fn a_product_has_the_bits_of_candles_own() {
        for (outputs, inputs) in SHAPES {
            for rows in [1, SHORT, HEIGHT, TALL] {
                let tensor = |rows, cols, seed| {
                    Tensor::from_vec(values(rows * cols, seed), (rows, cols), &Device::Cpu).expect("fits")
                };
                let (lhs, rhs) = (tensor(rows, inputs, 1), tensor(inputs, outputs.next_multiple_of(LANES), 2));
                let ours = lhs.apply_op2_no_bwd(&rhs, &Product).expect("fits");
                let candles = lhs.matmul(&rhs).expect("fits");
                assert_eq!(with_values(&ours, bits), with_values(&candles, bits), "{rows} x {inputs} x {outputs}");
            }
        }
    }

    #[test]
    fn without_agreeing_paths_each_row_is_computed_alone() {
        let alone = Paths { shared: false, tall: false, short: false };
        assert_eq!(alone.tile(100), (HEIGHT, 1));
        let known = RowPaths(Mutex::new(HashMap::from([((40, 24), alone)])));
        let matrix = Matrix::new(40, 24, values(40 * 24, 3), &known).expect("fits");
        assert_eq!(matrix.paths, alone);
        let input = values(5 * 24, 4);
        let output = matrix.product(&input).expect("fits");
        assert_eq!(bits(&output[40..80]), bits(&matrix.product(&input[24..48]).expect("fits")));
    }

    #[test]
    fn the_product_and_the_rows_are_those_of_the_matrix() {
        let (outputs, inputs) = (5, 3);
        let weight = values(outputs * inputs, 5);
        let matrix = Matrix::new(outputs, inputs, weight.clone(), &RowPaths::default()).expect("fits");
        let input = values(2 * inputs, 6);
        let output = matrix.product(&input).expect("fits");
        for (row, input) in input.chunks_exact(inputs).enumerate() {
            for (column, weight) in weight.chunks_exact(inputs).enumerate() {
                let expected: f64 = input.iter().zip(weight).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                assert!((f64::from(output[row * outputs + column]) - expected).abs() < 1e-6);
            }
        }
        let mut row = Vec::new();
        matrix.extend_row(4, &mut row);
        assert_eq!(row, weight[4 * inputs..]);
    }
}

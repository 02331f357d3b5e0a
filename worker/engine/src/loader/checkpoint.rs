//! Safetensors files, one or sharded, mapped into memory: names to shapes and bytes.
//!
//! Knows the format (8 bytes of header length, JSON, data) and checks every offset against the file before anything is
//! read, so that a header can neither make us allocate by its claim nor read beyond the file. Must not know
//! architectures.
#![allow(unsafe_code)] // Mapping a file; the block has its argument.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype as Stored, TensorInfo};
use serde::Deserialize;

use super::LoadError;
use crate::config::Dtype;

/// Longest header that is parsed: the limit of the safetensors library itself.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// The files of one model.
pub(super) struct Checkpoint {
    files: Vec<MappedFile>,
    tensors: HashMap<String, Located>,
    /// What is named when a tensor is nowhere: the only file, or the index.
    root: PathBuf,
}

/// A mapped file.
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
    data_start: usize,
}

impl MappedFile {
    /// All of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Bytes before the data: length and header.
    pub(crate) fn header(&self) -> &[u8] {
        &self.map[..self.data_start]
    }
}

struct Located {
    file: usize,
    info: TensorInfo,
}

/// One tensor of floating-point numbers.
pub(super) struct TensorView<'a> {
    /// Type of its elements.
    pub(super) dtype: Dtype,
    /// Its elements, little-endian, row-major.
    pub(super) bytes: &'a [u8],
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Maps the files of `dir` and checks their headers.
    pub(super) fn open(dir: &Path) -> Result<Self, LoadError> {
        let (single, index_path) = (dir.join("model.safetensors"), dir.join("model.safetensors.index.json"));
        if single.exists() {
            let mut checkpoint = Checkpoint { files: Vec::new(), tensors: HashMap::new(), root: single.clone() };
            checkpoint.add(single)?;
            return Ok(checkpoint);
        }
        if !index_path.exists() {
            return Err(LoadError::NoWeights { dir: dir.to_owned() });
        }
        let text = std::fs::read(&index_path).map_err(|source| LoadError::Read { path: index_path.clone(), source })?;
        let index: Index =
            serde_json::from_slice(&text).map_err(|source| LoadError::Index { path: index_path.clone(), source })?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort();
        names.dedup();
        let mut checkpoint = Checkpoint { files: Vec::new(), tensors: HashMap::new(), root: index_path.clone() };
        for name in names {
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(LoadError::IndexEscapes { path: index_path, file: name.clone() });
            }
            checkpoint.add(dir.join(name))?;
        }
        for (tensor, file) in &index.weight_map {
            if !checkpoint.tensors.contains_key(tensor) {
                let problem = format!("tensor {tensor} is missing, which the index says is here");
                return Err(LoadError::Header { path: dir.join(file), problem });
            }
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), LoadError> {
        let read = |source| LoadError::Read { path: path.clone(), source };
        let file = File::open(&path).map_err(read)?;
        // SAFETY: the bytes are only read as numbers, for which any value is valid. A published model directory is not
        // modified in place; if somebody truncates a file under us the process dies by SIGBUS, as for every user of
        // mapped weights.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let (data_start, infos) = header(&map).map_err(|problem| LoadError::Header { path: path.clone(), problem })?;
        let len = map.len() as u64;
        for (tensor, info) in infos {
            let end = data_start as u64 + info.data_offsets.1 as u64;
            if end > len {
                return Err(LoadError::Truncated { path, tensor, end, len });
            }
            let twice = self.tensors.insert(tensor.clone(), Located { file: self.files.len(), info }).is_some();
            if twice {
                return Err(LoadError::Header { path, problem: format!("tensor {tensor} is also in another file") });
            }
        }
        self.files.push(MappedFile { path, map, data_start });
        Ok(())
    }

    /// The mapped files, in the order of their names.
    pub(super) fn files(&self) -> &[MappedFile] {
        &self.files
    }

    /// Names and byte counts of all tensors.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&str, u64)> {
        self.tensors.iter().map(|(name, located)| {
            let (start, end) = located.info.data_offsets;
            (name.as_str(), (end - start) as u64)
        })
    }

    /// Type of a tensor's elements.
    pub(super) fn dtype_of(&self, name: &str) -> Result<Dtype, LoadError> {
        let located = self.located(name, &[])?;
        dtype(located.info.dtype).ok_or_else(|| self.wrong_dtype(name, located))
    }

    /// A tensor whose shape must be `expected`.
    pub(super) fn tensor(&self, name: &str, expected: &[usize]) -> Result<TensorView<'_>, LoadError> {
        let located = self.located(name, expected)?;
        let file = &self.files[located.file];
        if located.info.shape != expected {
            return Err(LoadError::TensorShape {
                path: file.path.clone(),
                tensor: name.to_owned(),
                expected: expected.to_vec(),
                found: located.info.shape.clone(),
            });
        }
        let dtype = dtype(located.info.dtype).ok_or_else(|| self.wrong_dtype(name, located))?;
        let (start, end) = located.info.data_offsets;
        let bytes = &file.map[file.data_start + start..file.data_start + end];
        Ok(TensorView { dtype, bytes })
    }

    fn located(&self, name: &str, expected: &[usize]) -> Result<&Located, LoadError> {
        self.tensors.get(name).ok_or_else(|| LoadError::MissingTensor {
            path: self.root.clone(),
            tensor: name.to_owned(),
            expected: expected.to_vec(),
        })
    }

    fn wrong_dtype(&self, name: &str, located: &Located) -> LoadError {
        let (path, found) = (self.files[located.file].path.clone(), format!("{:?}", located.info.dtype));
        LoadError::TensorDtype { path, tensor: name.to_owned(), found }
    }
}

fn dtype(stored: Stored) -> Option<Dtype> {
    match stored {
        Stored::BF16 => Some(Dtype::Bf16),
        Stored::F16 => Some(Dtype::F16),
        Stored::F32 => Some(Dtype::F32),
        // Quantised and integer types; the library's enum grows.
        _ => None,
    }
}

/// Where the data starts, and the tensors: each with offsets that are in order and as far apart as its shape says.
fn header(bytes: &[u8]) -> Result<(usize, BTreeMap<String, TensorInfo>), String> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!("{} bytes are too short for a safetensors file", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX || length > rest.len() as u64 {
        return Err(format!("the header claims {length} bytes, the file has {} after it", rest.len()));
    }
    let json = &rest[..length as usize];
    let mut entries: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(json).map_err(|error| format!("the header is not valid JSON: {error}"))?;
    entries.remove("__metadata__");
    let mut infos = BTreeMap::new();
    for (tensor, entry) in entries {
        let info: TensorInfo = serde_json::from_value(entry).map_err(|error| format!("tensor {tensor}: {error}"))?;
        let (start, end) = info.data_offsets;
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &n| bits.checked_mul(n));
        let size = end.checked_sub(start).and_then(|size| size.checked_mul(8));
        if size.is_none() || size != bits || end > isize::MAX as usize / 2 {
            let shape = &info.shape;
            return Err(format!("tensor {tensor}: offsets {start}..{end} do not hold {:?} {shape:?}", info.dtype));
        }
        infos.insert(tensor, info);
    }
    Ok((8 + length as usize, infos))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(claim: u64, json: &str, data: usize) -> String {
        let mut bytes = claim.to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        match header(&bytes) {
            Ok(_) => "none".to_owned(),
            Err(problem) => problem,
        }
    }

    #[test]
    fn a_header_is_believed_only_as_far_as_the_file_goes() {
        let good = r#"{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        assert_eq!(problem(good.len() as u64, good, 8), "none");
        assert!(problem(u64::MAX, good, 8).contains("claims"));
        assert!(problem(good.len() as u64 + 9, good, 8).contains("claims"));
        assert!(problem(3, good, 8).contains("not valid JSON"));
        for (shape, start, end) in
            [("[3]", "0", "8"), ("[2]", "8", "0"), ("[4294967296,4294967296,4294967296]", "0", "8")]
        {
            let json = format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}}}"#);
            assert!(problem(json.len() as u64, &json, 8).contains("tensor w: offsets"), "{json}");
        }
        let json = r#"{"w":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#;
        assert!(problem(json.len() as u64, json, 8).contains("tensor w"));
        assert!(header(&[1, 2, 3]).is_err());
    }
}

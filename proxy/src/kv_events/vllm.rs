//! What vLLM says of its prefix cache: one batch of events as it comes over ZeroMQ.
//!
//! Read from `vllm/distributed/kv_events.py` at 0181ea3 and, for older releases, from the published API pages since 0.9. A
//! message has three frames: topic, sequence number (8 bytes, big-endian, from 0 in each process) and this batch in
//! MessagePack. Batch and events came as arrays (msgspec's `array_like`) in all releases up to that commit, which sends maps;
//! both are read, each by itself. An event names its type by its first element, or under `type`. Fields have been added at the
//! end ever since, so what is not known is passed over, and what is missing has its default. A block's hash is a number or a
//! byte string, by vLLM's configuration.

use super::msgpack::{MsgpackError, Reader, Value};

/// Longest batch: seventy times what one scheduler step of 16,384 tokens takes (five bytes a token, 34 a hash).
pub(crate) const BATCH_BYTES_MAX: usize = 8 << 20;

/// vLLM's name for a block. Of its hashes, SHA-256 mostly, the first 16 bytes are kept: more than enough to tell blocks apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct EngineHash(pub(crate) [u8; 16]);

/// One scheduler step's events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Batch {
    /// In the order in which they happened.
    pub(crate) events: Vec<Event>,
    /// The rank whose cache they are of.
    pub(crate) data_parallel_rank: Option<u32>,
    /// Events of a type that is not known.
    pub(crate) num_unknown: u32,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Blocks were completed.
    Stored(Stored),
    /// Blocks were evicted.
    Removed(Removed),
    /// The cache was emptied.
    Cleared,
}

/// Blocks of one sequence that follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    /// Their names.
    pub(crate) blocks: Vec<EngineHash>,
    /// The block before the first of them; `None` at the start of a sequence.
    pub(crate) parent: Option<EngineHash>,
    /// Their tokens, [`Self::block_tokens`] for each.
    pub(crate) token_ids: Vec<u32>,
    /// Tokens of a block.
    pub(crate) block_tokens: usize,
    /// For each block, what its name depends on beside tokens ([`extra_of`]); empty where no block has any.
    pub(crate) extras: Vec<Option<Vec<u8>>>,
    /// Whose and where.
    pub(crate) place: Place,
    /// Whether the layers of this group need all blocks before, as attention does: for others a leading block says nothing.
    pub(crate) is_prefix: bool,
}

/// Blocks that are gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Removed {
    /// Their names.
    pub(crate) blocks: Vec<EngineHash>,
    /// Where the engine says so: for each block, how many copies of it are left.
    pub(crate) copies_left: Option<Vec<u32>>,
    /// Whose and where.
    pub(crate) place: Place,
}

/// Which part of an engine's cache an event is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The group of layers; models with layers of one kind have one.
    pub(crate) group: Option<u32>,
    /// In the device's memory, not in a slower tier.
    pub(crate) is_device: bool,
}

/// Fields of an event in the order in which an array has them, after its type.
const STORED_FIELDS: [&[u8]; 11] = [
    b"block_hashes",
    b"parent_block_hash",
    b"token_ids",
    b"block_size",
    b"lora_id",
    b"medium",
    b"lora_name",
    b"extra_keys",
    b"group_idx",
    b"kv_cache_spec_kind",
    b"kv_cache_spec_sliding_window",
];
const REMOVED_FIELDS: [&[u8]; 3] = [b"block_hashes", b"medium", b"group_idx"];
const BATCH_FIELDS: [&[u8]; 3] = [b"ts", b"events", b"data_parallel_rank"];

/// Kinds of layers for which a sequence can begin anywhere in the cache, or that keep no blocks of the whole beginning.
const NO_PREFIX_KINDS: [&[u8]; 4] = [b"sliding_window", b"sliding_window_mla", b"chunked_local_attention", b"mamba"];

/// Reads a batch.
///
/// # Errors
/// When it is not MessagePack, or its fields are of other types.
pub(crate) fn decode(payload: &[u8]) -> Result<Batch, MsgpackError> {
    let mut reader = Reader::new(payload);
    let mut batch = Batch::default();
    fields(
        &mut reader,
        |_| &BATCH_FIELDS[..],
        false,
        |name, reader| {
            match name {
                b"events" => {
                    reader.each(|reader| {
                        match event(reader)? {
                            Some(event) => batch.events.push(event),
                            None => batch.num_unknown += 1,
                        }
                        Ok(())
                    })?;
                }
                b"data_parallel_rank" => batch.data_parallel_rank = reader.number()?,
                _ => reader.skip()?,
            }
            Ok(())
        },
    )?;
    Ok(batch)
}

/// What a request's blocks depend on beside tokens, as [`Stored::extras`] has it: for the first block, and for each later one.
/// vLLM mixes the adapter's name into every block and the salt into the first.
pub(crate) fn extra_of(lora_name: Option<&str>, cache_salt: Option<&str>) -> (Option<Vec<u8>>, Option<Vec<u8>>) {
    let texts = |texts: [Option<&str>; 2]| {
        let mut extra = Vec::new();
        texts.into_iter().flatten().for_each(|text| push(&mut extra, Value::Text(text.as_bytes())));
        (!extra.is_empty()).then_some(extra)
    };
    (texts([lora_name, cache_salt]), texts([lora_name, None]))
}

/// All fields that any event has.
#[derive(Default)]
struct Fields<'a> {
    tag: &'a [u8],
    blocks: Vec<EngineHash>,
    parent: Option<EngineHash>,
    token_ids: Vec<u32>,
    block_size: usize,
    lora_id: Option<u64>,
    lora_name: Option<&'a [u8]>,
    extras: Vec<Option<Vec<u8>>>,
    medium: Option<&'a [u8]>,
    group: Option<u32>,
    kind: Option<&'a [u8]>,
    sliding_window: Option<u64>,
    copies_left: Option<Vec<u32>>,
}

fn event(reader: &mut Reader<'_>) -> Result<Option<Event>, MsgpackError> {
    let mut found = Fields::default();
    let names = |tag: &[u8]| match tag {
        b"BlockStored" => &STORED_FIELDS[..],
        b"BlockRemoved" => &REMOVED_FIELDS[..],
        _ => &[],
    };
    fields(reader, names, true, |name, reader| {
        match name {
            b"type" => found.tag = reader.text()?.ok_or(MsgpackError::Type)?,
            b"block_hashes" => {
                reader.each(|reader| {
                    found.blocks.push(engine_hash(reader)?.ok_or(MsgpackError::Type)?);
                    Ok(())
                })?;
            }
            b"parent_block_hash" => found.parent = engine_hash(reader)?,
            b"token_ids" => {
                reader.each(|reader| {
                    found.token_ids.push(reader.number()?.ok_or(MsgpackError::Type)?);
                    Ok(())
                })?;
            }
            b"block_size" => found.block_size = reader.number()?.ok_or(MsgpackError::Type)?,
            b"lora_id" => found.lora_id = reader.number()?,
            b"lora_name" => found.lora_name = reader.text()?,
            b"extra_keys" => {
                reader.each(|reader| {
                    found.extras.push(extra(reader)?);
                    Ok(())
                })?;
            }
            b"medium" => found.medium = reader.text()?,
            b"group_idx" => found.group = reader.number()?,
            b"kv_cache_spec_kind" => found.kind = reader.text()?,
            b"kv_cache_spec_sliding_window" => found.sliding_window = reader.number()?,
            b"remaining_copy_counts" => {
                let mut counts = Vec::new();
                let is_there = reader.each(|reader| {
                    counts.push(reader.number()?.ok_or(MsgpackError::Type)?);
                    Ok(())
                })?;
                found.copies_left = is_there.then_some(counts);
            }
            _ => reader.skip()?,
        }
        Ok(())
    })?;
    Ok(match found.tag {
        b"BlockStored" => Some(Event::Stored(found.stored()?)),
        b"BlockRemoved" => {
            let place = found.place();
            Some(Event::Removed(Removed { blocks: found.blocks, copies_left: found.copies_left, place }))
        }
        b"AllBlocksCleared" => Some(Event::Cleared),
        _ => None,
    })
}

impl Fields<'_> {
    fn place(&self) -> Place {
        Place { group: self.group, is_device: self.medium.is_none_or(|medium| medium.eq_ignore_ascii_case(b"gpu")) }
    }

    fn stored(self) -> Result<Stored, MsgpackError> {
        let is_whole = self.block_size > 0
            && Some(self.token_ids.len()) == self.blocks.len().checked_mul(self.block_size)
            && (self.extras.is_empty() || self.extras.len() == self.blocks.len());
        if !is_whole {
            return Err(MsgpackError::Type);
        }
        let place = self.place();
        // Releases before `extra_keys` name the adapter only.
        let adapter = self.lora_name.map(Value::Text).or(self.lora_id.map(Value::Unsigned));
        let extras = match adapter {
            Some(adapter) if self.extras.is_empty() => {
                let mut extra = Vec::new();
                push(&mut extra, adapter);
                vec![Some(extra); self.blocks.len()]
            }
            _ => self.extras,
        };
        let is_prefix = self.sliding_window.is_none() && self.kind.is_none_or(|kind| !NO_PREFIX_KINDS.contains(&kind));
        Ok(Stored {
            extras: if extras.iter().all(Option::is_none) { Vec::new() } else { extras },
            blocks: self.blocks,
            parent: self.parent,
            token_ids: self.token_ids,
            block_tokens: self.block_size,
            place,
            is_prefix,
        })
    }
}

/// Calls `each` with the name of every field and a reader that stands before its value, for a structure as a map or as an
/// array. `names` gives the fields of an array by its type, which is the first element where the structure `is_tagged`.
fn fields<'a>(
    reader: &mut Reader<'a>,
    names: impl Fn(&[u8]) -> &'static [&'static [u8]],
    is_tagged: bool,
    mut each: impl FnMut(&[u8], &mut Reader<'a>) -> Result<(), MsgpackError>,
) -> Result<(), MsgpackError> {
    match reader.next()? {
        Value::Map(len) => {
            for _ in 0..len {
                let name = reader.text()?.ok_or(MsgpackError::Type)?;
                each(name, reader)?;
            }
        }
        Value::Array(len) => {
            let mut left = len;
            let mut tag: &[u8] = b"";
            if is_tagged && left > 0 {
                let mut ahead = *reader;
                tag = ahead.text()?.ok_or(MsgpackError::Type)?;
                each(b"type", reader)?;
                left -= 1;
            }
            let names = names(tag);
            for index in 0..left as usize {
                match names.get(index) {
                    Some(name) => each(name, reader)?,
                    None => reader.skip()?,
                }
            }
        }
        _ => return Err(MsgpackError::Type),
    }
    Ok(())
}

fn engine_hash(reader: &mut Reader<'_>) -> Result<Option<EngineHash>, MsgpackError> {
    let mut hash = [0; 16];
    match reader.next()? {
        Value::Nil => return Ok(None),
        // Kept apart from byte strings by the ninth byte.
        Value::Unsigned(number) => {
            hash[..8].copy_from_slice(&number.to_le_bytes());
            hash[8] = 1;
        }
        Value::Signed(number) => {
            hash[..8].copy_from_slice(&number.to_le_bytes());
            hash[8] = 2;
        }
        Value::Bytes(bytes) if !bytes.is_empty() => {
            let len = bytes.len().min(16);
            hash[..len].copy_from_slice(&bytes[..len]);
        }
        _ => return Err(MsgpackError::Type),
    }
    Ok(Some(EngineHash(hash)))
}

/// What one block's name depends on beside tokens, as bytes that are equal for equal values however they are encoded.
fn extra(reader: &mut Reader<'_>) -> Result<Option<Vec<u8>>, MsgpackError> {
    let mut extra = Vec::new();
    let is_there = reader.each(|reader| {
        // Later releases send salt and adapter with a word before them; without it they are what earlier ones send.
        let mut ahead = *reader;
        let is_labelled = ahead.next()? == Value::Array(2)
            && matches!(ahead.next(), Ok(Value::Text(b"cache_salt" | b"lora" | b"lora_name")));
        if is_labelled {
            *reader = ahead;
        }
        reader.walk(&mut |value| push(&mut extra, value))
    })?;
    Ok((is_there && !extra.is_empty()).then_some(extra))
}

/// Appends a value in a form of our own, in which no two different sequences of values are the same bytes.
fn push(extra: &mut Vec<u8>, value: Value<'_>) {
    let mut whole = |kind: u8, content: &[u8]| {
        extra.push(kind);
        extra.extend_from_slice(&(content.len() as u64).to_le_bytes());
        extra.extend_from_slice(content);
    };
    match value {
        Value::Nil => whole(b'n', &[]),
        Value::Bool(is_true) => whole(b'b', &[u8::from(is_true)]),
        Value::Unsigned(number) => whole(b'u', &number.to_le_bytes()),
        Value::Signed(number) => whole(b'i', &number.to_le_bytes()),
        Value::Float(number) => whole(b'f', &number.to_bits().to_le_bytes()),
        Value::Text(text) => whole(b't', text),
        Value::Bytes(bytes) => whole(b'x', bytes),
        Value::Extension(bytes) => whole(b'e', bytes),
        Value::Array(len) => whole(b'a', &len.to_le_bytes()),
        Value::Map(len) => whole(b'm', &len.to_le_bytes()),
    }
}

#[cfg(test)]
mod tests;

//! Small files that are read again and again while the proxy runs: a bounded read, and faults said once.

use std::path::Path;
use tokio::io::AsyncReadExt as _;

/// What is wrong with a source now, so that it is said once and not at each look.
#[derive(Debug, Default)]
pub(crate) struct Complaint(Option<String>);

impl Complaint {
    /// Whether this has not been said yet.
    pub(crate) fn is_new(&mut self, text: &str) -> bool {
        let is_new = self.0.as_deref() != Some(text);
        if is_new {
            self.0 = Some(text.to_owned());
        }
        is_new
    }

    pub(crate) fn is_over(&mut self) {
        self.0 = None;
    }

    #[cfg(test)]
    pub(crate) fn stands(&self) -> bool {
        self.0.is_some()
    }
}

/// The whole of a file.
///
/// # Errors
/// When it can't be read, or is longer than `bytes_max`: nothing makes this process hold more.
pub(crate) async fn read(file: &Path, bytes_max: u64) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    tokio::fs::File::open(file).await?.take(bytes_max + 1).read_to_end(&mut content).await?;
    if content.len() as u64 > bytes_max {
        let text = format!("it is longer than {bytes_max} bytes");
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, text));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_read_up_to_its_bound() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        std::fs::write(&file, "12345").expect("written");
        assert_eq!(read(&file, 5).await.expect("it fits"), b"12345");
        assert_eq!(read(&file, 4).await.expect_err("too long").to_string(), "it is longer than 4 bytes");
    }

    #[test]
    fn a_fault_is_said_once_until_it_changes_or_ends() {
        let mut complaint = Complaint::default();
        assert_eq!(["a", "a", "b", "b"].map(|text| complaint.is_new(text)), [true, false, true, false]);
        complaint.is_over();
        assert!(complaint.is_new("b"));
    }
}

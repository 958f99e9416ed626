//! Opening what a user named: regular files, and for texts pipes too. A device has no end, and a FIFO would wait for a writer.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Opens a regular file, links followed.
pub fn open(path: &Path) -> Result<File> {
    checked(path, |kind| kind.is_file())
}

/// The bytes of a regular file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    all(open(path)?)
}

/// The text of a regular file.
pub fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read(path)?).map_err(|e| Error::new(ErrorKind::InvalidData, e))
}

/// The bytes of a regular file or of a pipe: `<(zcat text.gz)`.
pub fn read_stream(path: &Path) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileTypeExt;
    all(checked(path, |kind| kind.is_file() || kind.is_fifo())?)
}

fn all(mut file: File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn checked(path: &Path, wanted: impl Fn(std::fs::FileType) -> bool) -> Result<File> {
    let kind = std::fs::metadata(path)?.file_type();
    if kind.is_dir() {
        return Err(Error::new(ErrorKind::IsADirectory, "a folder where a file is wanted"));
    }
    if !wanted(kind) {
        return Err(Error::new(ErrorKind::InvalidInput, "a device, pipe or socket where a file is wanted"));
    }
    File::open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_folders_are_refused_and_links_followed() {
        let tmp = tempfile::tempdir().unwrap();
        let (file, link) = (tmp.path().join("a"), tmp.path().join("b"));
        std::fs::write(&file, "text").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(read_text(&link).unwrap(), "text");
        for bad in [Path::new("/dev/zero"), Path::new("/dev/tty"), tmp.path()] {
            assert!(read(bad).is_err() && read_stream(bad).is_err(), "{}", bad.display());
        }
        let fifo = tmp.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
        assert!(open(&fifo).unwrap_err().to_string().contains("pipe"), "and it did not wait for a writer");
        let writer = std::thread::spawn({
            let fifo = fifo.clone();
            move || std::fs::write(fifo, "streamed")
        });
        assert_eq!(read_stream(&fifo).unwrap(), b"streamed");
        writer.join().unwrap().unwrap();
    }
}

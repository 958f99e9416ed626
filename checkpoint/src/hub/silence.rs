//! A deadline on silence. The HTTP client has none, and a hub or a proxy may hold a connection open and say nothing for ever.

use std::io::{Error, ErrorKind};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use hf_hub::api::Progress;
use hf_hub::api::sync::ApiError;

/// What a transfer tells while it runs.
pub(super) enum Sign {
    /// A file of so many bytes begins, perhaps again.
    Begun(usize),
    /// So many bytes of it are here.
    Bytes(usize),
}

/// Where a transfer's signs of life go.
pub(super) struct Signs<T>(Sender<Said<T>>);

enum Said<T> {
    Sign(Sign),
    Done(Result<T, ApiError>),
}

impl<T> Signs<T> {
    /// Ends the thread, without a word, when nobody waits any more: what comes late is not put into the cache unchecked.
    fn tell(&self, sign: Sign) {
        if self.0.send(Said::Sign(sign)).is_err() {
            std::panic::resume_unwind(Box::new("nobody waits"));
        }
    }
}

impl<T> Progress for Signs<T> {
    fn init(&mut self, size: usize, _: &str) {
        self.tell(Sign::Begun(size));
    }

    fn update(&mut self, size: usize) {
        self.tell(Sign::Bytes(size));
    }

    fn finish(&mut self) {
        self.tell(Sign::Bytes(0));
    }
}

/// Does `work` on a thread of its own, and passes on its signs. Once nothing was heard for `limit` it is left to itself, with the lock
/// that it may hold on a file, and the error is one that [`is_silence`] knows.
pub(super) fn heard<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce(Signs<T>) -> Result<T, ApiError> + Send + 'static,
    sign: &mut dyn FnMut(Sign),
) -> Result<T, ApiError> {
    let (tell, told) = channel();
    let end = tell.clone();
    std::thread::Builder::new().name("hub".into()).spawn(move || {
        let done = work(Signs(tell));
        let _ = end.send(Said::Done(done));
    })?;
    loop {
        match told.recv_timeout(limit) {
            Ok(Said::Sign(s)) => sign(s),
            Ok(Said::Done(done)) => return done,
            Err(RecvTimeoutError::Timeout) => {
                let text = format!("the hub said nothing for {} s", limit.as_secs_f64());
                return Err(Error::new(ErrorKind::TimedOut, text).into());
            }
            Err(RecvTimeoutError::Disconnected) => return Err(Error::other("the transfer broke off").into()),
        }
    }
}

/// Whether the hub fell silent. Asking again in this process may find the file locked by what still waits.
pub(super) fn is_silence(error: &ApiError) -> bool {
    matches!(error, ApiError::IoError(e) if e.kind() == ErrorKind::TimedOut)
}

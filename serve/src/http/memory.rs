//! Connections without sockets: what strangers send is tried by the million (`tests/hostile`), through the same protocol and routes.

use std::io::Result as IoResult;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use axum::Router;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::http1::Builder;
use hyper_util::service::TowerToHyperService;
use lowbit_checkpoint::chat_template::ChatTemplate;
use tokio::runtime::Runtime;

use super::{App, ServerOptions, io, protocol, router};
use crate::engine::Engine;
use crate::error::Result;

/// A server that is handed what its clients send. One connection at a time.
pub struct InMemory {
    runtime: Runtime,
    router: Router,
    protocol: Builder,
}

impl InMemory {
    /// Of the options, those of the listening socket and of the drain mean nothing here.
    pub fn new(options: ServerOptions, engine: Engine, template: Option<ChatTemplate>, vocab: usize) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.map_err(io("cannot start the server's threads"))?;
        let app = Arc::new(App::new(options, engine, template, vocab));
        let mut protocol = protocol(&app);
        // The client has sent everything from the start, and listens on.
        protocol.half_close(true);
        Ok(Self { runtime, router: router(app), protocol })
    }

    /// Everything that a connection is sent back on which `sent` comes and then nothing more.
    pub fn answer(&self, sent: &[u8]) -> Vec<u8> {
        let said = Arc::new(Mutex::new(Vec::new()));
        let wire = Wire { sent: sent.to_vec(), read: 0, said: said.clone() };
        let service = TowerToHyperService::new(self.router.clone());
        // Nonsense ends a connection with an error; what was said before counts.
        let _ = self.runtime.block_on(async { self.protocol.serve_connection(wire, service).await });
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut said)
    }
}

struct Wire {
    sent: Vec<u8>,
    read: usize,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Read for Wire {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, mut to: ReadBufCursor<'_>) -> Poll<IoResult<()>> {
        let rest = self.sent.get(self.read..).unwrap_or_default();
        let piece = rest.get(..rest.len().min(to.remaining())).unwrap_or_default();
        to.put_slice(piece);
        let n = piece.len();
        self.read += n;
        Poll::Ready(Ok(()))
    }
}

impl Write for Wire {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<IoResult<usize>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<IoResult<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<IoResult<()>> {
        Poll::Ready(Ok(()))
    }
}

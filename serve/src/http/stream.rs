//! Server-sent events: a body that turns engine events into chunks, and cancels its jobs when it is dropped.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::engine::Event;

/// Makes the data of chunks from an event; `None` ends the stream after what was given before.
pub trait Format: Send + 'static {
    /// Chunks of an event.
    fn chunks(&mut self, index: usize, event: Event) -> Vec<serde_json::Value>;
    /// Chunks after the last event.
    fn last(&mut self) -> Vec<serde_json::Value>;
}

struct Events<F> {
    events: UnboundedReceiver<(usize, Event)>,
    format: F,
    /// Answers that have not ended.
    open: usize,
    over: bool,
}

fn write(chunks: Vec<serde_json::Value>) -> String {
    chunks.into_iter().map(|c| format!("data: {c}\n\n")).collect()
}

impl<F: Format + Unpin> hyper::body::Body for Events<F> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        let mut text = String::new();
        while !this.over {
            match this.events.poll_recv(cx) {
                Poll::Pending if text.is_empty() => return Poll::Pending,
                Poll::Pending => break,
                Poll::Ready(Some((index, event))) => {
                    let ends = matches!(event, Event::Done { .. } | Event::Failed(_));
                    text.push_str(&write(this.format.chunks(index, event)));
                    this.open -= usize::from(ends);
                }
                Poll::Ready(None) => this.open = 0,
            }
            if this.open == 0 {
                text.push_str(&write(this.format.last()));
                text.push_str("data: [DONE]\n\n");
                this.over = true;
            }
        }
        if text.is_empty() { Poll::Ready(None) } else { Poll::Ready(Some(Ok(Frame::data(text.into())))) }
    }
}

/// A streaming response to `answers` jobs.
pub fn response<F: Format + Unpin>(events: UnboundedReceiver<(usize, Event)>, answers: usize, format: F) -> Response {
    let mut r = Body::new(Events { events, format, open: answers, over: false }).into_response();
    let headers = r.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    r
}

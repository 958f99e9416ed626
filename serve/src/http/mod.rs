//! The protocol: routes, limits, connections.

mod answer;
mod chat;
mod completions;
mod error;
mod memory;
mod request;
mod stream;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use lowbit_checkpoint::chat_template::ChatTemplate;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::engine::Engine;
use crate::error::{Result, ServeError};
use error::ApiError;
pub use memory::InMemory;

/// How the server behaves.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where it listens.
    pub address: SocketAddr,
    /// The model's name in the API.
    pub name: String,
    /// Bearer token that requests must carry.
    pub api_key: Option<String>,
    /// Largest body.
    pub max_body_bytes: usize,
    /// From the start of a connection or request to the end of its header, and of its body.
    pub read_timeout: Duration,
    /// Connections at a time.
    pub max_connections: usize,
    /// Tokens of a chat answer that names no limit.
    pub default_max_tokens: usize,
    /// How long a drain may take.
    pub drain: Duration,
}

/// What handlers share.
pub struct App {
    engine: Engine,
    template: Option<ChatTemplate>,
    name: String,
    vocab: usize,
    default_max_tokens: usize,
    api_key: Option<String>,
    max_body_bytes: usize,
    read_timeout: Duration,
    next: AtomicU64,
    started: u64,
}

impl App {
    fn new(o: ServerOptions, engine: Engine, template: Option<ChatTemplate>, vocab: usize) -> Self {
        Self {
            engine,
            template,
            name: o.name,
            vocab,
            default_max_tokens: o.default_max_tokens,
            api_key: o.api_key,
            max_body_bytes: o.max_body_bytes,
            read_timeout: o.read_timeout,
            next: AtomicU64::new(0),
            started: now(),
        }
    }

    /// A fresh id.
    fn next_id(&self, kind: &str) -> String {
        format!("{kind}-{:x}-{:x}", self.started, self.next.fetch_add(1, Ordering::Relaxed))
    }
}

/// Seconds since the epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

/// A body as JSON, or an error that says where it is wrong.
fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> std::result::Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|e| ApiError::bad(format!("the body is not the JSON expected: {e}")))
}

/// A bound server.
pub struct Server {
    listener: std::net::TcpListener,
    runtime: Runtime,
    signals: Signals,
    options: ServerOptions,
}

/// What ends the server.
struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    async fn recv(&mut self) {
        tokio::select! {
            _ = self.term.recv() => (),
            _ = self.int.recv() => (),
        }
    }
}

fn io(what: &str) -> impl FnOnce(std::io::Error) -> ServeError {
    let what = what.to_string();
    move |source| ServeError::Io { what, source }
}

impl Server {
    /// Listens, and watches for SIGTERM and SIGINT from here on: one that comes before [`Server::run`] is not lost. Nothing is
    /// answered yet.
    pub fn bind(options: ServerOptions) -> Result<Self> {
        let what = format!("cannot listen on {}", options.address);
        let listener = std::net::TcpListener::bind(options.address).map_err(io(&what))?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.map_err(io("cannot start the server's threads"))?;
        let signals = {
            let _entered = runtime.enter();
            let watch = |kind| signal(kind).map_err(io("cannot watch for signals"));
            Signals { term: watch(SignalKind::terminate())?, int: watch(SignalKind::interrupt())? }
        };
        Ok(Self { listener, runtime, signals, options })
    }

    /// The address, with the port that was given where 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap_or(self.options.address)
    }

    /// Serves until SIGTERM or SIGINT, then refuses what is new and finishes what was accepted.
    pub fn run(
        self,
        engine: Engine,
        thread: JoinHandle<()>,
        template: Option<ChatTemplate>,
        vocab: usize,
    ) -> Result<()> {
        let runtime = self.runtime;
        let (limit, drain) = (self.options.max_connections.max(1), self.options.drain);
        let app = Arc::new(App::new(self.options, engine, template, vocab));
        let done = runtime.block_on(async {
            self.listener.set_nonblocking(true).map_err(io("cannot listen"))?;
            let listener = TcpListener::from_std(self.listener).map_err(io("cannot listen"))?;
            accept(listener, self.signals, app.clone(), limit, drain).await
        });
        // Handlers that outlived the drain go with the runtime, and the engine ends with the last of them.
        runtime.shutdown_timeout(Duration::from_secs(1));
        drop(app);
        let _ = thread.join();
        done
    }
}

async fn accept(
    listener: TcpListener,
    mut signals: Signals,
    app: Arc<App>,
    limit: usize,
    drain: Duration,
) -> Result<()> {
    let router = router(app.clone());
    let graceful = GracefulShutdown::new();
    let slots = Arc::new(tokio::sync::Semaphore::new(limit));
    loop {
        let stream = tokio::select! {
            () = signals.recv() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // Out of descriptors, or the client is gone already: neither is a reason to end.
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            },
        };
        let Ok(permit) = slots.clone().try_acquire_owned() else {
            drop(stream);
            continue;
        };
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = protocol(&app).serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            let _ = connection.await;
            drop(permit);
        });
    }
    drop(listener);
    app.engine.close();
    tokio::select! {
        () = graceful.shutdown() => Ok(()),
        () = tokio::time::sleep(drain) => Ok(()),
        () = signals.recv() => Ok(()),
    }
}

/// How a connection is read.
fn protocol(app: &App) -> hyper::server::conn::http1::Builder {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(app.read_timeout);
    builder
}

fn router(app: Arc<App>) -> Router {
    let v1 = Router::new()
        .route("/v1/completions", post(completions_route))
        .route("/v1/chat/completions", post(chat_route))
        .route("/v1/models", get(models))
        .route("/tokenize", post(tokenize_route))
        .route("/detokenize", post(detokenize_route))
        .layer(from_fn_with_state(app.clone(), authorize));
    let open = Router::new().route("/health", get(health)).route("/metrics", get(metrics));
    v1.merge(open).fallback(missing).method_not_allowed_fallback(not_allowed).with_state(app)
}

/// Compares without stopping at the first difference, so that timing says nothing about the key.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |d, (a, b)| d | (a ^ b)) == 0
}

async fn authorize(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if let Some(key) = &app.api_key {
        let sent = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        let sent = sent.and_then(|v| v.strip_prefix("Bearer "));
        if !sent.is_some_and(|s| same(s.as_bytes(), key.as_bytes())) {
            let why = "a bearer token is needed";
            return ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", why).into_response();
        }
    }
    next.run(request).await
}

/// The body, within the limits of size and time.
async fn read(app: &App, body: Body) -> std::result::Result<axum::body::Bytes, ApiError> {
    let limit = app.max_body_bytes;
    let too_large = || {
        let text = format!("the body is larger than {limit} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", text)
    };
    if hyper::body::Body::size_hint(&body).lower() > limit as u64 {
        // What is on its way is read first, or the client may see its connection reset instead of the answer.
        let _ = tokio::time::timeout(Duration::from_secs(1), to_bytes(body, limit.saturating_add(1 << 20))).await;
        return Err(too_large());
    }
    match tokio::time::timeout(app.read_timeout, to_bytes(body, limit)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(_)) => Err(too_large()),
        Err(_) => Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "the body came too slowly")),
    }
}

type Reply = std::result::Result<Response, ApiError>;

async fn completions_route(State(app): State<Arc<App>>, body: Body) -> Reply {
    let bytes = read(&app, body).await?;
    completions::handle(app, &bytes).await
}

async fn chat_route(State(app): State<Arc<App>>, body: Body) -> Reply {
    let bytes = read(&app, body).await?;
    chat::handle(app, &bytes).await
}

async fn tokenize_route(State(app): State<Arc<App>>, body: Body) -> Reply {
    let body: Value = parse(&read(&app, body).await?)?;
    let text = body.get("prompt").and_then(Value::as_str).ok_or_else(|| ApiError::field("prompt", "a text"))?;
    let special = body.get("add_special_tokens").and_then(Value::as_bool).unwrap_or(true);
    let ids = app.engine.tokenizer.encode(text, special).map_err(|e| ApiError::field("prompt", e.to_string()))?;
    Ok(axum::Json(json!({"count": ids.len(), "max_model_len": app.engine.max_len(), "tokens": ids})).into_response())
}

async fn detokenize_route(State(app): State<Arc<App>>, body: Body) -> Reply {
    let body: Value = parse(&read(&app, body).await?)?;
    let ids: Option<Vec<u32>> = body.get("tokens").and_then(|t| serde_json::from_value(t.clone()).ok());
    let ids = ids.ok_or_else(|| ApiError::field("tokens", "a list of token ids"))?;
    let text = app.engine.tokenizer.decode(&ids, false).map_err(|e| ApiError::field("tokens", e.to_string()))?;
    Ok(axum::Json(json!({"prompt": text})).into_response())
}

async fn models(State(app): State<Arc<App>>) -> Response {
    let model = json!({"id": app.name, "object": "model", "created": app.started, "owned_by": "lowbit",
        "max_model_len": app.engine.max_len()});
    axum::Json(json!({"object": "list", "data": [model]})).into_response()
}

async fn health(State(app): State<Arc<App>>) -> Response {
    match app.engine.is_closing() {
        false => StatusCode::OK.into_response(),
        true => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.engine.metrics.render(&app.name);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

async fn missing(request: Request) -> ApiError {
    let what = format!("there is no {}", request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, "not_found_error", what)
}

async fn not_allowed(method: Method) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", format!("{method} is not allowed here"))
}

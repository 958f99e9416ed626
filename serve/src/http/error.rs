//! Errors as OpenAI's clients expect them.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::error::ServeError;

/// A refused request.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<&'static str>,
    retry_after: Option<u64>,
}

impl ApiError {
    /// 400.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400, naming the field.
    pub fn field(param: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param), ..Self::bad(format!("`{param}`: {}", message.into())) }
    }

    /// Any other.
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, retry_after: None }
    }

    /// An engine's refusal; `retry_after` in seconds where trying again helps.
    pub fn from_engine(e: &ServeError, retry_after: u64) -> Self {
        let text = e.to_string();
        match e {
            ServeError::Request(_) => Self::bad(text),
            ServeError::Busy { .. } => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", text);
                Self { retry_after: Some(retry_after), ..error }
            }
            ServeError::Closing => Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", text),
            _ => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", text),
        }
    }

    /// The error object.
    pub fn body(&self) -> serde_json::Value {
        let code = self.status.as_u16();
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut r = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            r.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            r.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
        }
        r
    }
}

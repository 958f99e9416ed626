//! Errors of this crate: they know the place inside a matrix, never the layer's name; callers add that.

/// What can go wrong in number formats and operations.
#[expect(missing_docs, reason = "the messages say what the fields are")]
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A length does not follow from the shapes it was given with.
    #[error("{what}: expected {expected} elements, found {found}")]
    Length { what: &'static str, expected: usize, found: usize },
    /// A dimension must be a multiple of another.
    #[error("{what} {value} is not divisible by {by}")]
    NotDivisible { what: &'static str, value: usize, by: usize },
    /// A scheme name or field is not one we know.
    #[error("unknown scheme `{0}`: expected one of {names}", names = crate::scheme::LinearScheme::NAMES.join(", "))]
    UnknownScheme(String),
    /// Scales and zero points must be finite and non-zero before packing.
    #[error("scale {value} at row {row}, group {group} is not a finite non-zero number")]
    BadScale { row: usize, group: usize, value: f32 },
    /// A code is outside the range of its bits.
    #[error("code {code} at {index} does not fit in {bits} bits")]
    BadCode { index: usize, code: u8, bits: u8 },
    /// A zero point that a format cannot store.
    #[error("zero point 0 at row {row}, group {group} cannot be stored in {format}, which holds 1 and more")]
    ZeroPoint { row: usize, group: usize, format: &'static str },
    /// A size product overflowed.
    #[error("the size of {0} overflows")]
    Overflow(&'static str),
    /// The backend does not support the operation for these shapes.
    #[error("{backend} does not support {op}: {why}")]
    Unsupported { backend: &'static str, op: &'static str, why: String },
    /// A handle made by another backend was passed in.
    #[error("a {what} of another backend was given to {backend}")]
    ForeignHandle { backend: &'static str, what: &'static str },
    /// A kernel could not be launched, or was found at fault while it ran.
    #[error("kernel {kernel} ({launch}): {problem}")]
    Launch { kernel: &'static str, launch: String, problem: String },
    /// A device cannot be used.
    #[error("device {device}: {problem}")]
    Device { device: &'static str, problem: String, hint: Option<String> },
    /// A device has less memory free than an allocation needs.
    #[error("device {device}: {:.1} MB were asked for, of {:.1} MB that the device has {:.1} MB are free", mb(*asked), mb(*total), mb(*free))]
    OutOfMemory { device: &'static str, asked: usize, free: usize, total: usize },
}

/// Megabytes of 10⁶ bytes.
fn mb(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}

impl KernelError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            KernelError::Device { hint, .. } => hint.clone(),
            KernelError::OutOfMemory { free, .. } => Some(format!(
                "what fits is {:.1} MB more: fewer bits, fewer sequences at a time (-b; serve: --max-concurrent, --kv-tokens, --kv-cache int8), \
                 shorter ones (--seq-len), another program off the device, or --device cpu; `lowbit plan` says what a quantization needs",
                mb(*free)
            )),
            KernelError::UnknownScheme(_) => Some("w4a16 is weights of 4 bits, activations of 16".into()),
            KernelError::ZeroPoint { .. } => Some("GPTQ v2 holds it: --format gptq-v2".into()),
            _ => None,
        }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, KernelError>;

/// Fails unless `found == expected`.
pub fn check_len(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(KernelError::Length { what, expected, found }) }
}

//! Weights as they are stored, on the host.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::floats::FloatWeight;
use crate::scheme::Scheme;

/// Bytes that outlive the call: a memory map or a vector, shared without copying.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
    /// How the owner's are made, where that is when they are first read.
    make: Option<Make>,
}

/// What makes bytes, the same ones each time.
type Make = Arc<dyn Fn() -> Vec<u8> + Send + Sync>;

/// Bytes that are made when they are first read.
struct Made {
    make: Make,
    bytes: OnceLock<Vec<u8>>,
}

impl AsRef<[u8]> for Made {
    fn as_ref(&self) -> &[u8] {
        self.bytes.get_or_init(|| (self.make)())
    }
}

impl Bytes {
    /// A view of `range` of `owner`; `None` when the range is outside.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Option<Self> {
        (*owner).as_ref().get(range.clone())?;
        Some(Self { owner, range, make: None })
    }

    /// Takes a vector.
    pub fn from_vec(v: Vec<u8>) -> Self {
        let range = 0..v.len();
        Self { owner: Arc::new(v), range, make: None }
    }

    /// All `len` bytes that `make` gives, the same ones each time. It is called when they are first read, and they are held from then on.
    pub fn made_when_read(make: impl Fn() -> Vec<u8> + Send + Sync + 'static, len: usize) -> Self {
        Self::made_by(Arc::new(make), 0..len)
    }

    fn made_by(make: Make, range: Range<usize>) -> Self {
        let owner = Arc::new(Made { make: make.clone(), bytes: OnceLock::new() });
        Self { owner, range, make: Some(make) }
    }

    /// Whether there may be none of them before they are read, in memory or in a file.
    pub fn is_made_when_read(&self) -> bool {
        self.make.is_some()
    }

    /// The same bytes. Those that are made when they are read are made once more, and held only by what is returned here.
    #[must_use]
    pub fn afresh(&self) -> Self {
        match &self.make {
            Some(make) => Self::made_by(make.clone(), self.range.clone()),
            None => self.clone(),
        }
    }

    /// How many there are, without reading them.
    pub fn size(&self) -> usize {
        self.range.len()
    }

    /// A view of `range` of these bytes; `None` when the range is outside.
    pub fn part(&self, range: Range<usize>) -> Option<Self> {
        self.as_slice().get(range.clone())?;
        let start = self.range.start;
        let range = start + range.start..start + range.end;
        Some(Self { owner: self.owner.clone(), range, make: self.make.clone() })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

/// Float dtypes of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// 32-bit.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            FloatType::F32 => 4,
            FloatType::F16 | FloatType::Bf16 => 2,
        }
    }
}

/// A matrix as stored, on the host, before upload.
#[derive(Clone)]
pub enum HostWeight {
    /// `[out, in]` floats, little-endian.
    Dense {
        /// Element type.
        dtype: FloatType,
        /// Rows.
        out_features: usize,
        /// Columns.
        in_features: usize,
        /// All elements, row by row.
        data: Bytes,
    },
    /// Packed integers in compressed-tensors row order.
    Packed(PackedWeight),
    /// Codes that are small floats.
    Float(FloatWeight),
}

/// Integer codes packed along rows (see [`crate::pack`]), scales and zero points unpacked.
#[derive(Clone)]
pub struct PackedWeight {
    /// Number format.
    pub scheme: Scheme,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// `[out, ceil(in·bits/32)]` words, little-endian bytes.
    pub words: Bytes,
    /// `[out, groups]`.
    pub scales: Vec<f32>,
    /// `[out, groups]`; `None` when symmetric.
    pub zeros: Option<Vec<u8>>,
    /// `[in]` column → group when not `col / group`.
    pub group_index: Option<Vec<u32>>,
}

impl HostWeight {
    /// `(out, in)`.
    pub fn dims(&self) -> (usize, usize) {
        match self {
            HostWeight::Dense { out_features, in_features, .. } => (*out_features, *in_features),
            HostWeight::Packed(p) => (p.out_features, p.in_features),
            HostWeight::Float(f) => (f.out_features, f.in_features),
        }
    }

    /// Bytes one pass over the weight reads: codes, scales (16 bits each) and zero points, or the dense floats.
    pub fn stored_bytes(&self) -> usize {
        match self {
            HostWeight::Dense { data, .. } => data.as_slice().len(),
            HostWeight::Packed(p) => {
                let zeros = p.zeros.as_ref().map_or(0, |z| (z.len() * p.scheme.bits as usize).div_ceil(8));
                p.words.as_slice().len() + p.scales.len() * 2 + zeros
            }
            HostWeight::Float(f) => f.stored_bytes(),
        }
    }
}

//! A model whose next-token distribution is a closed formula, and a tokenizer of one token a byte.

use std::cell::RefCell;
use std::ops::Range;

use crate::encode::Encode;
use crate::engine::codec::Codec;
use crate::error::Result;
use crate::scorer::{LogitRows, Scorer};

type Formula = Box<dyn Fn(&[u32]) -> Vec<f32>>;

/// Logits as a function of the context.
pub(crate) struct Fake {
    vocab: usize,
    positions: usize,
    formula: Formula,
    /// Length of every input the model was run on.
    pub(crate) inputs: RefCell<Vec<usize>>,
}

impl Fake {
    pub(crate) fn new(vocab: usize, formula: impl Fn(&[u32]) -> Vec<f32> + 'static) -> Self {
        Self { vocab, positions: 4096, formula: Box::new(formula), inputs: RefCell::default() }
    }

    pub(crate) fn uniform(vocab: usize) -> Self {
        Self::new(vocab, move |_| vec![0.25; vocab])
    }

    /// The same distribution everywhere.
    pub(crate) fn constant(p: &[f32]) -> Self {
        let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
        Self::new(p.len(), move |_| logits.clone())
    }

    pub(crate) fn with_positions(mut self, positions: usize) -> Self {
        self.positions = positions;
        self
    }
}

struct Rows<'a> {
    model: &'a Fake,
    ids: Vec<u32>,
}

impl LogitRows for Rows<'_> {
    fn vocab_size(&self) -> usize {
        self.model.vocab
    }

    fn logits(&self, rows: Range<usize>) -> Result<Vec<f32>> {
        Ok(rows.flat_map(|r| (self.model.formula)(&self.ids[..=r])).collect())
    }
}

impl Scorer for Fake {
    fn vocab_size(&self) -> usize {
        self.vocab
    }

    fn max_positions(&self) -> usize {
        self.positions
    }

    fn run<'a>(&'a self, ids: &[u32]) -> Result<Box<dyn LogitRows + 'a>> {
        self.inputs.borrow_mut().push(ids.len());
        Ok(Box::new(Rows { model: self, ids: ids.to_vec() }))
    }
}

/// One token a byte; BOS is 256.
pub(crate) struct ByteTokenizer {
    /// Whether BOS is put in front.
    pub(crate) adds_bos: bool,
}

impl Encode for ByteTokenizer {
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let bos = (special && self.adds_bos).then_some(256);
        // BOS can be spelled in a text, as special tokens can: here by U+0100.
        let spelled = text.chars().flat_map(|c| if c == '\u{100}' { vec![256] } else { bytes(c) });
        Ok(bos.into_iter().chain(spelled).collect())
    }

    fn bos_id(&self) -> Option<u32> {
        Some(256)
    }
}

fn bytes(c: char) -> Vec<u32> {
    c.encode_utf8(&mut [0; 4]).bytes().map(u32::from).collect()
}

impl Codec for ByteTokenizer {
    fn eos_ids(&self) -> &[u32] {
        &[257]
    }

    fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let plain = |&id: &u32| char::from_u32(id).filter(|_| !(skip_special && id >= 256));
        Ok(ids.iter().filter_map(plain).collect())
    }
}

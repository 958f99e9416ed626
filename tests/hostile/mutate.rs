//! Seeded changes of an input: bits, bytes, numbers, pieces moved, doubled and cut, words of the formats put in.

use serde_json::{Value, json};

/// xorshift64*: the same inputs on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// What parsers trip over.
const WORDS: &[&str] = &[
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "-1",
    "0",
    "1e999",
    "-0",
    "NaN",
    "1.5",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999999",
    "\"../../x\"",
    "\"\\ud800\"",
    "[[[[[[[[",
    "{\"a\":",
    "\u{feff}",
    "\u{0}",
    "{{",
    "}}",
    "{%",
    "%}",
    "{{ 'a' * 1000000000 }}",
    "{% for i in range(100000) %}",
    "{% endfor %}",
    "|tojson(indent=1000000000)",
    "[0] * 100000000",
    "!function x.y",
    "&a [*a,*a]",
    "<<: *a",
    "include: task.yaml\n",
    "\r\n\r\n",
    "data: ",
    "\n\n",
    "Transfer-Encoding: chunked\r\n",
    "Content-Length: 18446744073709551615\r\n",
    "ffffffffffffffff\r\n",
    ",\"x\"\"",
    "\"",
    "F32",
    "U8",
];

/// A JSON value with some nodes replaced, doubled or dropped, so that what comes after the parser is reached too.
fn changed(value: &mut Value, random: &mut Random) {
    let children = match value {
        Value::Array(a) => a.len(),
        Value::Object(o) => o.len(),
        _ => 0,
    };
    // Down to a child most of the time.
    if children > 0 && random.below(5) > 0 {
        let at = random.below(children);
        let child = match value {
            Value::Array(a) => a.get_mut(at),
            Value::Object(o) => o.values_mut().nth(at),
            _ => None,
        };
        return changed(child.unwrap(), random);
    }
    match (random.below(4), &mut *value) {
        (0, Value::Object(o)) if children > 0 => {
            let key = o.keys().nth(random.below(children)).unwrap().clone();
            let old = o.remove(&key);
            if random.below(2) == 0 {
                o.insert(format!("{key}x"), old.unwrap());
            }
        }
        (0, Value::Array(a)) if children > 0 => {
            let twin = a[random.below(children)].clone();
            a.resize(children + 1 + random.below(3), twin);
        }
        (1, Value::Array(a)) => a.truncate(random.below(children + 1)),
        (1, Value::Number(n)) => {
            let by = [-1.0, 0.5, 2.0, 1e6][random.below(4)];
            *value = n
                .as_f64()
                .map_or(Value::Null, |x| if (x * by).fract() == 0.0 { json!((x * by) as i64) } else { json!(x * by) });
        }
        (1, Value::String(s)) => s.push_str(["x", "/../..", "\u{0}", "*", "("][random.below(5)]),
        _ => {
            let big = "9".repeat(40);
            let other = [
                json!(null),
                json!(true),
                json!([]),
                json!({}),
                json!(""),
                json!(0),
                json!(1),
                json!(-1),
                json!(0.5),
                json!(1e308),
                json!(3),
                json!(64),
                json!(u64::MAX),
                json!(i64::MIN),
                json!(u32::MAX),
                json!("../x"),
                json!(big),
                json!([[]]),
                json!({"a": 1}),
            ];
            *value = other[random.below(other.len())].clone();
        }
    }
}

/// The JSON of an input, after a tag or a length where it has one.
struct Held {
    value: Value,
    /// Bytes before it.
    start: usize,
    /// Where the bytes after it begin.
    end: usize,
}

impl Held {
    /// None where the input holds no JSON.
    fn find(input: &[u8]) -> Option<Self> {
        let start = input.iter().take(9).position(|b| *b == b'{' || *b == b'[')?;
        let mut values = serde_json::Deserializer::from_slice(&input[start..]).into_iter::<Value>();
        let value = values.next()?.ok()?;
        Some(Self { value, start, end: start + values.byte_offset() })
    }

    /// The input with its JSON changed.
    fn changed(&self, input: &[u8], random: &mut Random) -> Vec<u8> {
        let mut value = self.value.clone();
        for _ in 0..1 + random.below(3) {
            changed(&mut value, random);
        }
        let text = value.to_string().into_bytes();
        let head =
            if self.start == 8 { (text.len() as u64).to_le_bytes().to_vec() } else { input[..self.start].to_vec() };
        [&head[..], &text, &input[self.end..]].concat()
    }
}

/// Inputs that others are made from. Their JSON is read once: that would cost more than most readers do.
pub struct Pool {
    inputs: Vec<Vec<u8>>,
    held: Vec<Option<Held>>,
}

impl Pool {
    pub fn new(inputs: Vec<Vec<u8>>) -> Self {
        let held = inputs.iter().map(|input| Held::find(input)).collect();
        Self { inputs, held }
    }

    pub fn inputs(&self) -> &[Vec<u8>] {
        &self.inputs
    }

    /// One input made from these.
    pub fn mutated(&self, random: &mut Random) -> Vec<u8> {
        if random.below(2) == 0 {
            let at = random.below(self.inputs.len());
            if let Some(held) = &self.held[at] {
                return held.changed(&self.inputs[at], random);
            }
        }
        spoilt(&self.inputs, random)
    }
}

/// One input with bytes of others, whatever they mean.
fn spoilt(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut out = seeds[random.below(seeds.len())].clone();
    for _ in 0..1 + random.below(4) {
        let (len, at) = (out.len(), random.below(out.len()));
        match random.below(13) {
            0 if len > 0 => out[at] ^= 1 << random.below(8),
            1 if len > 0 => out[at] = random.next() as u8,
            2 if len > 0 => out[at] = [0, 0xff, 0x7f, 0x80, b'"', b'{', b'[', b'9'][random.below(8)],
            3 => out.truncate(at),
            4 => {
                let end = (at + 1 + random.below(16)).min(len);
                out.drain(at.min(end)..end);
            }
            5 => {
                let end = (at + 1 + random.below(64)).min(len);
                let piece = out[at.min(end)..end].to_vec();
                let to = random.below(out.len() + 1);
                out.splice(to..to, piece);
            }
            6 if len >= 8 => {
                let value = [0, 1, 2, 255, 65_535, 1 << 31, u64::from(u32::MAX), 1 << 40, i64::MAX as u64, u64::MAX]
                    [random.below(10)];
                let (width, at) = ([2, 4, 8][random.below(3)], at.min(len - 8));
                out[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            }
            7 | 8 => {
                let word = WORDS[random.below(WORDS.len())].as_bytes();
                out.splice(at..at, word.iter().copied());
            }
            // A value of text: from one delimiter to the next.
            9 | 10 if len > 0 => {
                let stops = b",:{}[]\"\n ";
                let end = out[at..].iter().position(|b| stops.contains(b)).map_or(len, |n| at + n);
                let start = out[..at].iter().rposition(|b| stops.contains(b)).map_or(0, |n| n + 1);
                let word = WORDS[random.below(WORDS.len())].as_bytes();
                out.splice(start..end, word.iter().copied());
            }
            11 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                out.truncate(at);
                out.extend_from_slice(&other[from.min(other.len())..]);
            }
            _ => {
                let byte = [b'[', b'{', b'(', b'0', b' ', b'\n'][random.below(6)];
                out.splice(at..at, std::iter::repeat_n(byte, [3, 100, 1000][random.below(3)]));
            }
        }
    }
    // Long inputs say nothing more.
    out.truncate(1 << 18);
    out
}

use super::*;
use crate::fake::ByteTokenizer;

fn plan(protocol: &str, text: &str, adds_bos: bool) -> Result<WindowPlan> {
    let setup = Setup { max_positions: 8, ..Setup::default() };
    let source = Source::from_text("t", text.to_owned());
    protocol.parse::<Protocol>()?.plan(&source, &ByteTokenizer { adds_bos }, &setup)
}

#[test]
fn names_round_trip() {
    for name in ["gptq-2048", "llama.cpp-512", "lm-eval-word", "lm-eval-word:2048", "stride:512"] {
        assert_eq!(name.parse::<Protocol>().unwrap().to_string(), name);
    }
    for name in ["gptq", "gptq-1", "llama.cpp-x", "stride:0", "wikitext"] {
        assert!(name.parse::<Protocol>().is_err(), "{name}");
    }
}

#[test]
fn gptq_drops_the_tail() {
    let p = plan("gptq-4", "abcdefghij", true).unwrap();
    assert_eq!((p.windows.len(), p.scored_tokens(), p.bos), (2, 6, "stream start"));
    assert_eq!(p.windows[0].ids[0], 256);
    assert_eq!(p.windows[1].ids, [b'd', b'e', b'f', b'g'].map(u32::from));
    assert_eq!((p.windows[1].scored.clone(), p.weights), (1..4, vec![3.0; 2]));
    let short = plan("gptq-4", "abc", false);
    assert!(matches!(short, Err(EvalError::TooShort { needed: 4, found: 3, .. })));
}

#[test]
fn llama_cpp_scores_the_second_half_after_bos() {
    let p = plan("llama.cpp-512", &"x".repeat(1600), true).unwrap();
    assert_eq!((p.windows.len(), p.bos), (3, "every window"));
    for w in &p.windows {
        assert_eq!((w.ids[0], w.scored.clone(), w.scored.len()), (256, 257..512, 255));
    }
    let p = plan("llama.cpp-512", &"x".repeat(1600), false).unwrap();
    assert_eq!((p.windows[0].ids[0], p.bos), (u32::from(b'x'), "none"));
    let short = plan("llama.cpp-512", &"x".repeat(1023), false);
    assert!(matches!(short, Err(EvalError::TooShort { needed: 1024, .. })));
}

#[test]
fn stride_states_its_length() {
    let p = plan("stride:3", "abcdefghijkl", false).unwrap();
    assert_eq!((p.window, p.scored_tokens()), (8, 11));
    let scored: Vec<_> = p.windows.iter().map(|w| w.scored.clone()).collect();
    assert_eq!(scored, [1..8, 5..8, 5..6]);
    assert!(matches!(plan("stride:9", "abcdefghijkl", false), Err(EvalError::BadSetting { .. })));
}

#[test]
fn a_page_is_a_cluster_weighed_by_words() {
    let pages = vec!["one two three".to_owned(), String::new(), "four five".to_owned()];
    let source = Source::from_pages("p", pages);
    let setup = Setup { max_positions: 8, ..Setup::default() };
    let p = Protocol::LmEvalWord { max_length: None };
    let plan = p.plan(&source, &ByteTokenizer { adds_bos: false }, &setup).unwrap();
    assert_eq!(plan.weights, [3.0, 1.0, 2.0]);
    let clusters: Vec<_> = plan.windows.iter().map(|w| w.cluster).collect();
    assert_eq!((clusters, plan.scored_tokens()), (vec![0, 0, 2, 2], 22));
    let text = Source::from_text("t", "x".into());
    assert!(matches!(p.plan(&text, &ByteTokenizer { adds_bos: true }, &setup), Err(EvalError::NoPages(_))));
}

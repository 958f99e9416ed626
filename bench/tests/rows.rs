//! Files as people have them: Parquet, and conversations in ShareGPT's form.
#![allow(clippy::print_stderr)]

use std::path::Path;
use std::sync::Arc;

use lowbit_bench::load::data::{CountTokens, Data, Item};
use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

fn words() -> CountTokens {
    Arc::new(|t: &str| t.split_whitespace().count())
}

#[test]
fn rows_of_a_parquet_file_are_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.parquet");
    let schema =
        parse_message_type("message rows { REQUIRED BYTE_ARRAY prompt (UTF8); OPTIONAL INT32 output_tokens; }");
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema.unwrap()), Arc::default()).unwrap();
    let mut rows = writer.next_row_group().unwrap();
    let mut prompts = rows.next_column().unwrap().unwrap();
    let texts = ["one", "two words", "three"].map(ByteArray::from);
    prompts.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
    prompts.close().unwrap();
    let mut lengths = rows.next_column().unwrap().unwrap();
    // The second has none.
    lengths.typed::<Int32Type>().write_batch(&[7, 9], Some(&[1, 0, 1]), None).unwrap();
    lengths.close().unwrap();
    rows.close().unwrap();
    writer.close().unwrap();
    let data = Data::read(&path, "rows", false, Some(5), None).unwrap();
    let asked: Vec<(String, Option<u32>)> =
        data.items(0).take(4).map(|i| (i.messages[0].content.clone(), i.output_tokens)).collect();
    let want = [("one", 7), ("two words", 5), ("three", 9), ("one", 7)].map(|(t, n)| (t.to_string(), Some(n)));
    assert_eq!(asked, want);
    std::fs::write(&path, b"PAR1 and no more").unwrap();
    assert!(Data::read(&path, "rows", false, None, None).is_err());
}

/// A thousand conversations: every turn of a person is asked, in order, and answered with the length of the answer that is there.
#[test]
fn a_file_of_sharegpts_form_is_asked_whole() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/chat/sharegpt_form_1000.json");
    if !path.exists() {
        eprintln!("skipped: {} is absent", path.display());
        return;
    }
    let all = |count| -> Vec<Item> {
        let data = Data::read(&path, "chat", false, None, count).unwrap();
        data.items(0).take(data.rows()).collect()
    };
    let counted = all(Some(words()));
    assert_eq!(counted.len(), 1000);
    assert_eq!(counted.iter().map(|i| 1 + i.later.len()).sum::<usize>(), 2479);
    assert!(counted.iter().all(|i| i.messages.len() == 1 && i.messages[0].role == "user"));
    assert!(counted.iter().all(|i| i.output_tokens >= Some(1) && i.later.iter().all(|l| l.1 >= Some(1))));
    assert!(counted[0].messages[0].content.starts_with("Do you know why turkeys"));
    assert_eq!(counted[0].output_tokens, Some(33));
    // Nobody to count: the server's own limit holds.
    assert!(all(None).iter().all(|i| i.output_tokens.is_none()));
}

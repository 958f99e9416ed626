//! The task files that come with the program.

/// Name and text of each.
const FILES: &[(&str, &str)] = &[
    ("_mmlu_base.yaml", include_str!("../../tasks/_mmlu_base.yaml")),
    ("arc_challenge.yaml", include_str!("../../tasks/arc_challenge.yaml")),
    ("arc_easy.yaml", include_str!("../../tasks/arc_easy.yaml")),
    ("boolq.yaml", include_str!("../../tasks/boolq.yaml")),
    ("commonsense_qa.yaml", include_str!("../../tasks/commonsense_qa.yaml")),
    ("copa.yaml", include_str!("../../tasks/copa.yaml")),
    ("gsm8k.yaml", include_str!("../../tasks/gsm8k.yaml")),
    ("hellaswag.yaml", include_str!("../../tasks/hellaswag.yaml")),
    ("lambada_openai.yaml", include_str!("../../tasks/lambada_openai.yaml")),
    ("mmlu.yaml", include_str!("../../tasks/mmlu.yaml")),
    ("mmlu_humanities.yaml", include_str!("../../tasks/mmlu_humanities.yaml")),
    ("mmlu_other.yaml", include_str!("../../tasks/mmlu_other.yaml")),
    ("mmlu_social_sciences.yaml", include_str!("../../tasks/mmlu_social_sciences.yaml")),
    ("mmlu_stem.yaml", include_str!("../../tasks/mmlu_stem.yaml")),
    ("mmlu_subjects.yaml", include_str!("../../tasks/mmlu_subjects.yaml")),
    ("openbookqa.yaml", include_str!("../../tasks/openbookqa.yaml")),
    ("piqa.yaml", include_str!("../../tasks/piqa.yaml")),
    ("truthfulqa_mc1.yaml", include_str!("../../tasks/truthfulqa_mc1.yaml")),
    ("truthfulqa_mc2.yaml", include_str!("../../tasks/truthfulqa_mc2.yaml")),
    ("wikitext.yaml", include_str!("../../tasks/wikitext.yaml")),
    ("winogrande.yaml", include_str!("../../tasks/winogrande.yaml")),
];

/// The text of a shipped file.
pub fn text(name: &str) -> Option<&'static str> {
    FILES.iter().find(|f| f.0 == name).map(|f| f.1)
}

/// The shipped file of that name.
pub fn find(name: &str) -> Option<&'static str> {
    FILES.iter().find(|f| f.0 == name).map(|f| f.0)
}

/// Names of all shipped files that define something: one whose name begins with `_` is only included.
pub fn names() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|f| f.0).filter(|n| !n.starts_with('_'))
}

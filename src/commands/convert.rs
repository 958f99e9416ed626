//! `lowbit convert`: GGUF or packed → bf16; packed → packed where the codes allow it losslessly.

use std::path::Path;

use anyhow::{Result, bail};
use lowbit_checkpoint::converted::{self, ConvertRecord};
use lowbit_checkpoint::quant_config::{
    Layout, PackFormat, QuantConfig, WrittenGroup, by_scheme, write_compressed_tensors, write_uniform,
};
use lowbit_checkpoint::writer::{CheckpointWriter, DEFAULT_SHARD_BYTES, Declared};
use lowbit_checkpoint::{Checkpoint, CheckpointError, Dtype, linear};
use lowbit_kernels::backend::{FloatType, HostWeight};
use lowbit_kernels::{LinearScheme, QuantizedWeight};
use lowbit_model::block::{matrices, router_modules};
use lowbit_model::decoder;
use lowbit_quantize::Progress;

use crate::args::{ConvertArgs, FormatArg};
use crate::context::Context;
use crate::models;

/// Converts.
pub fn convert(ctx: &Context, args: &ConvertArgs) -> Result<()> {
    if args.output.exists() && !args.force {
        return Err(CheckpointError::Exists { path: args.output.clone() }.into());
    }
    let gguf = models::gguf_file(Path::new(&args.model));
    if let Some(file) = gguf.as_ref().filter(|_| matches!(args.format, FormatArg::Bf16 | FormatArg::CompressedTensors))
    {
        models::import_gguf(ctx, file, &args.output, args.format != FormatArg::Bf16, args.force)?;
    } else {
        let located = models::locate(ctx, &args.model)?;
        super::quantize::refuse_same(&located.dir, &args.output)?;
        let ckpt = located.open()?;
        repack(ctx, &ckpt, args)?;
    }
    ctx.print(&serde_json::json!({"output": args.output}), || format!("wrote {}", args.output.display()))
}

/// The dtype of what is not packed: the norms tell.
fn model_dtype(ckpt: &Checkpoint) -> FloatType {
    ckpt.store
        .iter()
        .filter(|(n, _)| n.ends_with("norm.weight"))
        .find_map(|(_, t)| t.float_type())
        .unwrap_or(FloatType::Bf16)
}

struct Item {
    module: String,
    out: usize,
    n: usize,
    scheme: LinearScheme,
    declared: Vec<Declared>,
}

fn repack(ctx: &Context, ckpt: &Checkpoint, args: &ConvertArgs) -> Result<()> {
    let Some(q) = &ckpt.quantization else {
        bail!("{} is not quantized: there is nothing to convert", ckpt.dir.display());
    };
    if ckpt.config.gathers_experts() {
        bail!(
            "{}: engines know the experts of `{}` in tensors of their own order, which convert does not write\nhint: `lowbit quantize` on the original weights writes another scheme",
            ckpt.dir.display(),
            ckpt.config.family
        );
    }
    let target = match args.format {
        FormatArg::Bf16 => None,
        FormatArg::CompressedTensors => Some(Layout::new(PackFormat::CompressedTensors, model_dtype(ckpt))),
        FormatArg::Gptq => Some(Layout::new(PackFormat::GptqV1, FloatType::F16)),
        FormatArg::GptqV2 => Some(Layout::new(PackFormat::GptqV2, FloatType::F16)),
        FormatArg::Gguf => {
            bail!("convert does not write GGUF\nhint: `lowbit quantize --format gguf` on the original weights")
        }
        FormatArg::Awq => Some(Layout::new(PackFormat::Awq, FloatType::F16)),
    };
    let format = target.map(|t| t.format);
    if format == Some(q.format) {
        bail!("{} is in that format already", ckpt.dir.display());
    }
    let (items, dense) = collect(ckpt, q, target)?;
    let uniform = format.filter(|f| f.is_uniform());
    if let Some(format) = uniform
        && let Some(other) = items.iter().find(|i| items.first().is_some_and(|f| f.scheme != i.scheme))
    {
        bail!(
            "`{}` has another scheme than the first linear: the format {} holds one\nhint: --format bf16",
            other.module,
            format.name()
        );
    }
    let packed_prefixes: Vec<String> = items.iter().map(|i| format!("{}.", i.module)).collect();
    let of_packed = |name: &str| {
        packed_prefixes
            .iter()
            .any(|p| name.strip_prefix(p.as_str()).is_some_and(|rest| rest != "bias" && !rest.contains('.')))
    };
    let mut declared: Vec<Declared> = items.iter().flat_map(|i| i.declared.clone()).collect();
    // Scales of keys and values mean nothing without the scheme that names them.
    let of_cache = |name: &str| q.kv.is_some() && (name.ends_with(".k_scale") || name.ends_with(".v_scale"));
    let copies: Vec<String> =
        ckpt.store.iter().map(|(n, _)| n.to_string()).filter(|n| !of_packed(n) && !of_cache(n)).collect();
    for name in &copies {
        let t = ckpt.store.get(name)?;
        declared.push(Declared { name: name.clone(), dtype: t.dtype, shape: t.shape.clone() });
    }
    let _writing = ctx.writing();
    let mut writer = CheckpointWriter::create(&args.output, declared, DEFAULT_SHARD_BYTES, args.force)?;
    ctx.progress.stage("convert", (items.len() + copies.len()) as u64);
    for name in &copies {
        writer.write(name, ckpt.store.get(name)?.data.as_slice())?;
        ctx.progress.advance(1);
    }
    for item in &items {
        ctx.check_stop()?;
        let weight = match ckpt.linear(&item.module, item.out, item.n)? {
            HostWeight::Packed(p) => QuantizedWeight::Int(linear::unpack(&p)?),
            HostWeight::Float(f) => QuantizedWeight::Float(f),
            HostWeight::Dense { .. } => continue,
        };
        match (target, weight) {
            // Other layouts hold no float codes, so that `collect` let none pass.
            (None, weight) | (_, weight @ QuantizedWeight::Float(_)) => {
                let bytes: Vec<u8> =
                    weight.dequantize()?.iter().flat_map(|w| half::bf16::from_f32(*w).to_le_bytes()).collect();
                writer.write(&format!("{}.weight", item.module), &bytes)?;
            }
            (Some(layout), QuantizedWeight::Int(matrix)) => {
                if let Some(s) = matrix.scales.iter().find(|s| layout.scales.round(**s) != **s) {
                    bail!(
                        "`{}` has the scale {s}, which {:?} does not hold exactly: the format would change the weights\nhint: quantize the original with the other --format",
                        item.module,
                        layout.scales
                    );
                }
                if layout.format == PackFormat::GptqV1 && matrix.zeros.as_ref().is_some_and(|z| z.contains(&0)) {
                    bail!(
                        "`{}` has a zero point of 0: GPTQ v1 stores it minus one, and engines do not wrap\nhint: --format gptq-v2",
                        item.module
                    );
                }
                for (d, bytes) in item.declared.iter().zip(linear::encode(&matrix, layout)?) {
                    writer.write(&d.name, &bytes)?;
                }
            }
        }
        ctx.progress.advance(1);
    }
    writer.carry_over(
        &ckpt.dir,
        &["config.json", "quantize_config.json", "quantize.json", "recipe.yaml", converted::FILE],
    )?;
    let before = ConvertRecord::read(&ckpt.dir)?.and_then(|r| r.bits);
    let bits = q.groups.iter().map(|g| g.scheme.code_bits()).chain(before).min();
    writer.write_file(converted::FILE, &ConvertRecord::new(Path::new(&args.model), bits).to_bytes())?;
    let mut config = ckpt.raw_config.clone();
    if let Some(map) = config.as_object_mut() {
        map.remove("quantization_config");
        map.remove("compression_config");
        let written = match format {
            None => None,
            Some(PackFormat::CompressedTensors) => {
                let mut rules = by_scheme(items.iter().map(|i| (i.scheme, i.module.clone())));
                if let [(_, names)] = rules.as_mut_slice() {
                    *names = vec!["Linear".into()];
                }
                Some(write_compressed_tensors(&WrittenGroup::taken_over(rules), &dense, None))
            }
            Some(format) => {
                let head = items.iter().any(|i| i.module.ends_with("lm_head"));
                let scheme = items.first().and_then(|i| i.scheme.int());
                scheme.map(|scheme| write_uniform(format, scheme, None, head, &dense))
            }
        };
        if let Some(w) = written {
            if matches!(format, Some(PackFormat::GptqV1 | PackFormat::GptqV2)) {
                writer.write_file("quantize_config.json", format!("{w:#}\n").as_bytes())?;
            }
            map.insert("quantization_config".into(), w);
        }
    }
    writer.write_file("config.json", format!("{config:#}\n").as_bytes())?;
    ckpt.store.unchanged()?;
    writer.finish()?;
    Ok(())
}

/// What is quantized, and the modules that are not.
fn collect(ckpt: &Checkpoint, q: &QuantConfig, target: Option<Layout>) -> Result<(Vec<Item>, Vec<String>)> {
    let c = &ckpt.config;
    let prefix = decoder::prefix(ckpt)?;
    let mut modules = matrices(c, prefix);
    let head = decoder::head(prefix);
    if ckpt.has_weight(head) {
        modules.push((head.into(), c.vocab_size, c.hidden_size));
    }
    let mut items = Vec::new();
    let mut dense: Vec<String> = (0..c.num_layers)
        .flat_map(|i| router_modules(c, i).into_iter().map(move |(m, _)| format!("{prefix}.layers.{i}.{m}")))
        .collect();
    for (module, out, n) in modules {
        let weight = ckpt.linear(&module, out, n)?;
        let Some(scheme) = ckpt.scheme_of(&module, &weight) else {
            // The embedding is not a linear: no rule would ever cover it.
            if !module.ends_with("embed_tokens") {
                dense.push(module);
            }
            continue;
        };
        if target.is_some() && matches!(&weight, HostWeight::Packed(p) if p.group_index.is_some()) {
            bail!(
                "`{module}` has an unsorted g_idx: its columns cannot be carried into the other format losslessly\nhint: --format bf16"
            );
        }
        if let Some(t) = target.filter(|t| !t.format.holds(scheme, out, n)) {
            let way_out =
                if q.format == PackFormat::CompressedTensors { "bf16" } else { "compressed-tensors, or bf16" };
            bail!(
                "`{module}` is {} [{out}, {n}], which the format {} does not hold\nhint: --format {way_out}",
                scheme.full_name(),
                t.format.name()
            );
        }
        let declared = match target {
            None => vec![Declared { name: format!("{module}.weight"), dtype: Dtype::BF16, shape: vec![out, n] }],
            Some(f) => linear::declare(&module, scheme, f, out, n)?,
        };
        items.push(Item { module, out, n, scheme, declared });
    }
    Ok((items, dense))
}

//! `lowbit convert`: GGUF or packed → bf16; packed → packed where the codes allow it losslessly.

use std::path::Path;

use anyhow::{Result, bail};
use lowbit_checkpoint::quant_config::{Layout, PackFormat, WrittenGroup, write_compressed_tensors, write_gptq};
use lowbit_checkpoint::writer::{CheckpointWriter, DEFAULT_SHARD_BYTES, Declared};
use lowbit_checkpoint::{Checkpoint, CheckpointError, Dtype, linear};
use lowbit_kernels::Scheme;
use lowbit_kernels::backend::{FloatType, HostWeight};
use lowbit_model::block::linear_shapes;
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
    if args.model.ends_with(".gguf") {
        if args.format != FormatArg::Bf16 {
            bail!("a GGUF file converts to bf16; quantize the result\nhint: drop --format");
        }
        models::import_gguf(ctx, Path::new(&args.model), &args.output, args.force)?;
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
    /// Of integer codes.
    scheme: Option<Scheme>,
    declared: Vec<Declared>,
}

fn repack(ctx: &Context, ckpt: &Checkpoint, args: &ConvertArgs) -> Result<()> {
    let Some(q) = &ckpt.quantization else {
        bail!("{} is not quantized: there is nothing to convert", ckpt.dir.display());
    };
    let target = match args.format {
        FormatArg::Bf16 => None,
        FormatArg::CompressedTensors => Some(Layout::new(PackFormat::CompressedTensors, model_dtype(ckpt))),
        FormatArg::Gptq => Some(Layout::new(PackFormat::GptqV1, FloatType::F16)),
    };
    let format = target.map(|t| t.format);
    if format == Some(q.format) {
        bail!("{} is in that format already", ckpt.dir.display());
    }
    let (items, dense) = collect(ckpt, target)?;
    if format == Some(PackFormat::GptqV1)
        && let Some(other) = items.iter().find(|i| items.first().is_some_and(|f| f.scheme != i.scheme))
    {
        bail!(
            "`{}` has another scheme than the first linear: the GPTQ format holds one\nhint: --format bf16",
            other.module
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
        let matrix = match ckpt.linear(&item.module, item.out, item.n)? {
            HostWeight::Packed(p) => linear::unpack(&p)?,
            // Only `collect` with no other format in view lets these pass.
            HostWeight::Float(f) => {
                let bytes: Vec<u8> =
                    f.dequantize()?.iter().flat_map(|w| half::bf16::from_f32(*w).to_le_bytes()).collect();
                writer.write(&format!("{}.weight", item.module), &bytes)?;
                ctx.progress.advance(1);
                continue;
            }
            HostWeight::Dense { .. } => continue,
        };
        match target {
            None => {
                let bytes: Vec<u8> =
                    matrix.dequantize()?.iter().flat_map(|w| half::bf16::from_f32(*w).to_le_bytes()).collect();
                writer.write(&format!("{}.weight", item.module), &bytes)?;
            }
            Some(layout) => {
                if let Some(s) = matrix.scales.iter().find(|s| layout.scales.round(**s) != **s) {
                    bail!(
                        "`{}` has the scale {s}, which {:?} does not hold exactly: the format would change the weights\nhint: quantize the original with the other --format",
                        item.module,
                        layout.scales
                    );
                }
                for (d, bytes) in item.declared.iter().zip(linear::encode(&matrix, layout)?) {
                    writer.write(&d.name, &bytes)?;
                }
            }
        }
        ctx.progress.advance(1);
    }
    writer.carry_over(&ckpt.dir, &["config.json", "quantize_config.json", "quantize.json", "recipe.yaml"])?;
    let mut config = ckpt.raw_config.clone();
    if let Some(map) = config.as_object_mut() {
        map.remove("quantization_config");
        map.remove("compression_config");
        let written = match format {
            None => None,
            Some(PackFormat::CompressedTensors) => {
                let groups: Vec<WrittenGroup<'_>> = q
                    .groups
                    .iter()
                    .filter_map(|g| g.scheme.int())
                    .map(|scheme| WrittenGroup {
                        scheme: scheme.into(),
                        targets: vec!["Linear".into()],
                        observer: "memoryless_minmax",
                        static_act_order: false,
                    })
                    .collect();
                Some(write_compressed_tensors(&groups, &dense, None))
            }
            Some(_) => items
                .first()
                .and_then(|i| i.scheme)
                .map(|scheme| write_gptq(scheme, None, items.iter().any(|i| i.module.ends_with("lm_head")), &dense)),
        };
        if let Some(w) = written {
            if format != Some(PackFormat::CompressedTensors) {
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

fn collect(ckpt: &Checkpoint, target: Option<Layout>) -> Result<(Vec<Item>, Vec<String>)> {
    let c = &ckpt.config;
    let prefix = decoder::prefix(ckpt)?;
    let mut modules: Vec<(String, usize, usize)> = Vec::new();
    for i in 0..c.num_layers {
        modules.extend(
            linear_shapes(c)
                .iter()
                .map(|s| (format!("{prefix}.layers.{i}.{}", s.suffix), s.out_features, s.in_features)),
        );
    }
    modules.push((format!("{prefix}.embed_tokens"), c.vocab_size, c.hidden_size));
    if ckpt.has_weight("lm_head") {
        modules.push(("lm_head".into(), c.vocab_size, c.hidden_size));
    }
    let mut items = Vec::new();
    let mut dense = Vec::new();
    for (module, out, n) in modules {
        let (scheme, shuffled) = match ckpt.linear(&module, out, n)? {
            HostWeight::Packed(p) => (Some(p.scheme), p.group_index.is_some()),
            HostWeight::Float(_) => (None, false),
            HostWeight::Dense { .. } => {
                // The embedding is not a linear: no rule would ever cover it.
                if !module.ends_with("embed_tokens") {
                    dense.push(module);
                }
                continue;
            }
        };
        if target.is_some() && shuffled {
            bail!(
                "`{module}` has an unsorted g_idx: its columns cannot be carried into the other format losslessly\nhint: --format bf16"
            );
        }
        let declared = match (target, scheme) {
            (None, _) => vec![Declared { name: format!("{module}.weight"), dtype: Dtype::BF16, shape: vec![out, n] }],
            (Some(f), Some(scheme)) => linear::declare(&module, scheme, f, out, n)?,
            (Some(_), None) => {
                bail!("`{module}` holds float codes: no other packed format holds them\nhint: --format bf16")
            }
        };
        items.push(Item { module, out, n, scheme, declared });
    }
    Ok((items, dense))
}

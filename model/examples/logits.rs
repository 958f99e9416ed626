//! Logits of a checkpoint for given token ids, for programs that compare engines: `logits DIR OUT ID...` writes `[tokens, vocab]`
//! f32, little-endian. Products are exact f32: what is compared is what a checkpoint means, not the rounding of quicker products.

use std::path::Path;
use std::sync::Arc;

use lowbit_checkpoint::Checkpoint;
use lowbit_kernels::cpu::CpuBackend;
use lowbit_model::Model;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, dir, out, ids @ ..] = args.as_slice() else { return Err("usage: logits DIR OUT ID...".into()) };
    let ids = ids.iter().map(|i| i.parse()).collect::<Result<Vec<u32>, _>>()?;
    let model = Model::load(&Checkpoint::open(Path::new(dir))?, Arc::new(CpuBackend::new().exact(true)))?;
    let bytes: Vec<u8> = model.logits_of(&ids)?.iter().flat_map(|l| l.to_le_bytes()).collect();
    std::fs::write(out, bytes)?;
    Ok(())
}

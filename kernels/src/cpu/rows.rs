//! Rows taken apart and put together: what experts and latent attention need beside products. Both host backends and the defaults of
//! others use these loops; they only move and add, so there is one version.

use super::checks;
use crate::backend::Column;
use crate::error::{KernelError, Result, check_len};

/// `y[rows[i]] += factors[i] · x[i]`, i ascending; the product is rounded before it is added.
pub fn add_weighted(
    backend: &'static str,
    y: &mut [f32],
    width: usize,
    x: &[f32],
    rows: &[u32],
    factors: &[f32],
) -> Result<()> {
    let total = checks::rows("rows to add to", y.len(), width)?;
    check_len("weighted rows", checks::product("weighted rows", rows.len(), width)?, x.len())?;
    check_len("row factors", rows.len(), factors.len())?;
    for ((row, factor), x) in rows.iter().zip(factors).zip(x.chunks_exact(width)) {
        let row = *row as usize;
        checks::below(backend, "add_weighted_rows", "row", row, total)?;
        for (y, x) in y[row * width..][..width].iter_mut().zip(x) {
            *y += factor * x;
        }
    }
    Ok(())
}

/// `y[t][j] = parts[columns[j].part][t][columns[j].column]`, 0 where there is no column.
pub fn assemble(backend: &'static str, parts: &[(&[f32], usize)], columns: &[Option<Column>]) -> Result<Vec<f32>> {
    let counts = parts.iter().map(|(x, w)| checks::rows("columns", x.len(), *w)).collect::<Result<Vec<_>>>()?;
    let total = counts.first().copied().unwrap_or(0);
    if let Some(other) = counts.iter().find(|n| **n != total) {
        return Err(KernelError::Unsupported {
            backend,
            op: "assemble_columns",
            why: format!("parts of {total} and of {other} rows"),
        });
    }
    for c in columns.iter().flatten() {
        checks::below(backend, "assemble_columns", "part", c.part, parts.len())?;
        checks::below(backend, "assemble_columns", "column", c.column, parts[c.part].1)?;
    }
    let mut y = Vec::with_capacity(checks::product("columns", total, columns.len())?);
    for t in 0..total {
        y.extend(columns.iter().map(|c| c.map_or(0.0, |c| parts[c.part].0[t * parts[c.part].1 + c.column])));
    }
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, WeightedRows};
    use crate::cpu::{CpuBackend, ScalarBackend};

    #[test]
    fn rows_are_added_in_order_and_columns_put_together() {
        let (scalar, cpu) = (ScalarBackend::new(), CpuBackend::new());
        for b in [&scalar as &dyn Backend, &cpu] {
            let up = |v: &[f32]| b.upload(v).unwrap();
            let mut y = up(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
            let (x, z) = (up(&[1.0, 10.0, 2.0, 20.0]), up(&[7.0, 8.0]));
            let parts = [
                WeightedRows { x: &x, rows: &[2, 0], factors: &[0.5, 2.0] },
                WeightedRows { x: &z, rows: &[2], factors: &[1.0] },
            ];
            b.add_weighted_rows(&mut y, 2, &parts).unwrap();
            assert_eq!(b.download(&y).unwrap(), [5.0, 42.0, 3.0, 4.0, 12.5, 19.0]);
            let outside = [WeightedRows { x: &z, rows: &[3], factors: &[1.0] }];
            assert!(b.add_weighted_rows(&mut y, 2, &outside).is_err());

            let at = |part, column| Some(Column { part, column });
            let two = [(&y, 2), (&up(&[9.0, 8.0, 7.0]), 1)];
            let got = b.assemble_columns(&two, &[at(1, 0), None, at(0, 1), at(1, 0)]).unwrap();
            assert_eq!(b.download(&got).unwrap(), [9.0, 0.0, 42.0, 9.0, 8.0, 0.0, 4.0, 8.0, 7.0, 0.0, 19.0, 7.0]);
            assert!(b.assemble_columns(&two, &[at(0, 2)]).is_err() && b.assemble_columns(&two, &[at(2, 0)]).is_err());
            assert!(b.assemble_columns(&[(&y, 2), (&z, 1)], &[at(0, 0)]).is_err());
        }
    }
}

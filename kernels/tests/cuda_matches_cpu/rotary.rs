//! Rotary position embedding.

use kernels::ops::rotary::{RotaryPairs, RotaryTables, rotary};
use kernels::{DType, Tensor};
use rand::RngExt;

use super::{ACTIVATIONS, Fixture, LAYOUTS, tolerance};

#[test]
fn rotated_heads_are_those_of_the_cpu() {
    let mut fixture = Fixture::new(31);
    let mut case = 0;
    for dtype in ACTIVATIONS {
        // Heads, their width, and half of what is turned.
        for (heads, head_dim, half) in
            [(1, 2, 1), (3, 16, 8), (4, 64, 32), (5, 100, 32), (2, 33, 5), (9, 128, 64)]
        {
            for pairs in [RotaryPairs::HalfApart, RotaryPairs::Adjacent] {
                case += 1;
                let layout = LAYOUTS[case % LAYOUTS.len()];
                let rows = 1 + case % 4;
                let mut x = fixture.values(rows, heads * head_dim, dtype);
                let (cos, sin) = (fixture.values(9, half, DType::F32), fixture.values(9, half, DType::F32));
                let positions: Vec<u32> = (0..rows).map(|_| fixture.random.random_range(0..9)).collect();
                let positions = Tensor::from_slice(&positions, 1, rows);
                let mut there = fixture.upload(&x, dtype, layout);
                let tables = RotaryTables { cos: &cos, sin: &sin, pairs };
                rotary(&fixture.cpu, x.view_mut(), head_dim, positions.view(), tables).expect("shapes fit");

                let (cos, sin) = (fixture.weights(&cos), fixture.weights(&sin));
                let positions = fixture.cuda.upload(&positions).expect("memory");
                let tables = RotaryTables { cos: &cos, sin: &sin, pairs };
                rotary(&fixture.cuda, there.view_mut(), head_dim, positions.view(), tables)
                    .expect("shapes fit");
                let what =
                    format!("{dtype:?} {pairs:?}, {rows} rows of {heads} x {head_dim} ({half}) {layout:?}");
                fixture.check(&what, &there, &x, tolerance(dtype));
            }
        }
    }
}

//! A grammar's mask: what it does not allow has no probability.

use super::NoToken;

/// Takes the probability of the tokens whose bits in `mask` are 0; a bit for each logit, from the lowest on. Refused where no
/// token is left that has any.
pub(super) fn apply(mask: &[u32], logits: &mut [f32]) -> Result<(), NoToken> {
    let mut any_left = false;
    for (word, logits) in mask.iter().zip(logits.chunks_mut(32)) {
        if *word == 0 {
            logits.fill(f32::NEG_INFINITY);
            continue;
        }
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
            any_left |= *logit > f32::NEG_INFINITY;
        }
    }
    if any_left { Ok(()) } else { Err(NoToken::NothingAllowed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_allowed_keeps_its_logit() {
        let mut logits: Vec<f32> = (0..70).map(|id| id as f32).collect();
        apply(&[1 << 3, 0, 1 << 1 | 1 << 31], &mut logits).unwrap();
        let kept: Vec<usize> = (0..70).filter(|id| logits[*id] > f32::NEG_INFINITY).collect();
        assert_eq!(kept, [3, 65]);
        assert_eq!((logits[3], logits[65]), (3.0, 65.0));
    }

    #[test]
    fn a_row_of_which_nothing_is_left_is_refused() {
        let check = |mask: &[u32], mut logits: Vec<f32>| {
            assert_eq!(apply(mask, &mut logits), Err(NoToken::NothingAllowed));
        };
        check(&[0, 0], vec![1.0; 40]);
        check(&[2], vec![1.0, f32::NEG_INFINITY, 2.0]);
    }
}

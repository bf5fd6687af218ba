//! A small deterministic mutator for the replay of the corpus: the same seed gives the same inputs
//! on every machine. It knows nothing of coverage; libFuzzer does.

/// Draws mutations of a corpus.
#[derive(Debug)]
pub struct Mutator {
    state: u64,
    len_max: usize,
}

impl Mutator {
    /// A mutator that starts at `seed` and makes inputs of at most `len_max` bytes.
    #[must_use]
    pub fn new(seed: u64, len_max: usize) -> Self {
        Self { state: seed | 1, len_max }
    }

    /// One of the inputs, changed in one to eight places.
    #[must_use]
    pub fn mutate(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut input = corpus[self.below(corpus.len())].clone();
        for _ in 0..=self.below(8) {
            self.change(&mut input, corpus);
        }
        input.truncate(self.len_max);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let end = (at + 1 + self.below(16)).min(input.len());
        match self.below(7) {
            0 if at < input.len() => input[at] ^= 1 << self.below(8),
            1 if at < input.len() => input[at] = self.byte(),
            2 => input.insert(at, self.byte()),
            3 => drop(input.drain(at..end)),
            4 => {
                let copy = input[at..end].to_vec();
                let to = self.below(input.len() + 1);
                input.splice(to..to, copy);
            }
            5 => input.truncate(at),
            _ => {
                let other = &corpus[self.below(corpus.len())];
                let from = self.below(other.len() + 1);
                let until = (from + self.below(64)).min(other.len());
                input.splice(at..end, other[from..until].iter().copied());
            }
        }
    }

    /// A byte: as often one that parsers care for as any.
    fn byte(&mut self) -> u8 {
        const ODD: &[u8] = b"\0\n\r \"'#*+-./0:=[]\\_aA\x30\x7f\x80\x82\xa0\xff";
        match self.below(2) {
            0 => ODD[self.below(ODD.len())],
            _ => u8::try_from(self.below(256)).expect("below 256"),
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        // xorshift64* (Vigna 2016), the high half.
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let high = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        usize::try_from(high).expect("32 bits fit") % bound
    }
}

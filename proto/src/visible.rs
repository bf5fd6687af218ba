//! Characters that show what they are: what may stand in a line of a log or on a terminal.

/// Neither a control character, nor one that breaks lines, joins nothing or turns the direction of
/// writing.
#[must_use]
pub fn is_visible(c: char) -> bool {
    let turns = matches!(
        c,
        '\u{61c}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{2069}'
            | '\u{feff}'
    );
    !c.is_control() && !turns
}

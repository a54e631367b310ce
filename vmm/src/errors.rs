//! Errors as users read them: one line, outermost first, each cause once.

use std::error::Error;

/// The error and its causes. Some errors quote their cause and some leave it to the reader; either way a cause stands in
/// the text once.
pub fn text(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let quoted = cause.to_string();
        if !text.ends_with(&quoted) {
            text = format!("{text}: {quoted}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Layer {
        #[error("quotes: {0}")]
        Quotes(#[source] Box<dyn Error + Send + Sync>),
        #[error("leaves it")]
        Leaves(#[source] Box<dyn Error + Send + Sync>),
    }

    #[test]
    fn every_cause_stands_once() {
        let cause = || std::io::Error::other("disk on fire").into();
        let quoted = Layer::Quotes(Layer::Quotes(cause()).into());
        assert_eq!(text(&quoted), "quotes: quotes: disk on fire");
        let left = Layer::Quotes(Layer::Leaves(Layer::Quotes(cause()).into()).into());
        assert_eq!(text(&left), "quotes: leaves it: quotes: disk on fire");
    }
}

//! The grammar inside an option's value: `key=value,key=value`, sizes and switches, as QEMU's `util/qemu-option.c`
//! reads them.

/// One `key=value` of an option, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) key: String,
    pub(crate) value: String,
}

/// What an option's properties may be called, for reading switches without a value and for naming mistakes.
pub(crate) type Known<'a> = &'a dyn Fn(&str) -> bool;

/// Splits a value into pairs. A comma ends a value unless it is doubled. A first value without key belongs to
/// `implied`; a later word without `=` is a switch, on, or off if it starts with `no` and is no property itself.
pub(crate) fn parse(text: &str, implied: Option<&str>, known: Known<'_>) -> Vec<Pair> {
    let mut pairs = Vec::new();
    if text.is_empty() {
        return pairs;
    }
    for (index, word) in split(text).into_iter().enumerate() {
        let pair = match (word.split_once('='), implied) {
            (Some((key, value)), _) => Pair { key: key.into(), value: value.into() },
            (None, Some(implied)) if index == 0 => Pair { key: implied.into(), value: word },
            (None, _) => match word.strip_prefix("no") {
                Some(rest) if !known(&word) && known(rest) => Pair { key: rest.into(), value: "off".into() },
                _ => Pair { key: word, value: "on".into() },
            },
        };
        pairs.push(pair);
    }
    pairs
}

/// Splits at single commas and turns doubled ones into one.
fn split(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        if char == ',' && chars.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(char);
        }
    }
    words
}

/// Reads a switch.
pub(crate) fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(format!("'{text}' is neither on nor off")),
    }
}

/// Reads a size in bytes: a number, decimal (with fraction) or 0x hexadecimal, with an optional suffix B, K, M, G or T
/// of either case (powers of 1024). Without suffix it counts in units of `default_unit` bytes.
pub(crate) fn parse_size(text: &str, default_unit: u64) -> Result<u64, String> {
    let bad = || format!("'{text}' is no size (a number with an optional suffix K, M, G or T)");
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let number = u64::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'));
        return number.ok_or_else(bad)?.checked_mul(default_unit).ok_or_else(bad);
    }
    let (number, unit) = match text.find(|char: char| char.is_ascii_alphabetic()) {
        None => (text, default_unit),
        Some(at) => {
            let unit = match &text[at..] {
                "B" | "b" => 1,
                "K" | "k" => 1 << 10,
                "M" | "m" => 1 << 20,
                "G" | "g" => 1 << 30,
                "T" | "t" => 1_u64 << 40,
                _ => return Err(bad()),
            };
            (&text[..at], unit)
        }
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    // Nine decimal places are exact to the byte well past the sizes that fit a machine.
    if !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let scale = 10_u128.pow(fraction.len() as u32);
    let part = fraction.parse::<u128>().map_err(|_| bad())? * u128::from(unit) / scale;
    whole.checked_mul(unit).and_then(|bytes| bytes.checked_add(u64::try_from(part).ok()?)).ok_or_else(bad)
}

/// Writes a size the way a user would.
pub(crate) fn show_size(bytes: u64) -> String {
    for (suffix, unit) in [("T", 1_u64 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)] {
        if bytes >= unit && bytes.is_multiple_of(unit) {
            return format!("{}{suffix}", bytes / unit);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs(text: &str, implied: Option<&str>) -> Vec<(String, String)> {
        let known = |key: &str| ["wait", "server", "nodelay"].contains(&key);
        parse(text, implied, &known).into_iter().map(|pair| (pair.key, pair.value)).collect()
    }

    #[test]
    fn grammar() {
        for (text, implied, expected) in [
            ("", None, &[][..]),
            ("microvm,a=b", Some("type"), &[("type", "microvm"), ("a", "b")]),
            ("a=b=c,d=", Some("type"), &[("a", "b=c"), ("d", "")]),
            ("path=/x,,y,server,nowait", None, &[("path", "/x,y"), ("server", "on"), ("wait", "off")]),
            ("p,nodelay,nofoo", Some("x"), &[("x", "p"), ("nodelay", "on"), ("nofoo", "on")]),
            ("a,,,b=1", Some("x"), &[("x", "a,"), ("b", "1")]),
            ("a=1,", None, &[("a", "1"), ("", "on")]),
        ] {
            let expected: Vec<_> = expected.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            assert_eq!(pairs(text, implied), expected, "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, expected) in [
            ("1", 1 << 20),
            ("1G", 1 << 30),
            ("1.5g", 3 << 29),
            ("0x10", 16 << 20),
            ("512k", 512 << 10),
            ("2T", 2 << 40),
            ("4096B", 4096),
        ] {
            assert_eq!(parse_size(text, 1 << 20), Ok(expected), "{text}");
        }
        for text in [
            "",
            "G",
            "1X",
            "1GB",
            "-1",
            "1.",
            ".5G",
            "1e3",
            "99999999T",
            "0x",
            "0x+1",
            "18446744073709551616",
        ] {
            assert!(parse_size(text, 1).is_err(), "{text}");
        }
        assert_eq!(show_size(3 << 29), "1536M");
        assert_eq!(show_size(1000), "1000");
    }

    proptest! {
        #[test]
        fn shown_sizes_read_back(bytes: u64) {
            prop_assert_eq!(parse_size(&show_size(bytes), 1), Ok(bytes));
        }

        #[test]
        fn doubled_commas_protect_any_value(value in "[^=]{0,20}") {
            let text = format!("key={}", value.replace(',', ",,"));
            prop_assert_eq!(pairs(&text, None), vec![("key".to_owned(), value)]);
        }

        #[test]
        fn any_size_text_is_survived(text: String) {
            let _ = parse_size(&text, 1 << 20);
        }
    }
}

//! The class of a request: who goes first when not all can.

/// A class, from 0 to 7; the higher goes first. Four have names, with room between them for a site's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Class(u8);

/// A word or number that is no class.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no class: one of critical, high, normal, low, or a number from 0 to 7")]
pub(crate) struct UnknownClass;

impl Class {
    pub(crate) const COUNT: usize = 8;
    pub(crate) const CRITICAL: Class = Class(7);
    pub(crate) const HIGH: Class = Class(5);
    pub(crate) const NORMAL: Class = Class(3);
    pub(crate) const LOW: Class = Class(1);

    const NAMES: [(&'static str, Class); 4] =
        [("critical", Class::CRITICAL), ("high", Class::HIGH), ("normal", Class::NORMAL), ("low", Class::LOW)];

    /// Every class, the lowest first.
    pub(crate) fn all() -> impl DoubleEndedIterator<Item = Class> {
        (0..Class::COUNT as u8).map(Class)
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }

    /// The class as metric labels spell it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self.0 {
            0 => "0",
            1 => "low",
            2 => "2",
            3 => "normal",
            4 => "4",
            5 => "high",
            6 => "6",
            _ => "critical",
        }
    }
}

impl Default for Class {
    fn default() -> Self {
        Class::NORMAL
    }
}

impl TryFrom<u64> for Class {
    type Error = UnknownClass;

    fn try_from(level: u64) -> Result<Self, UnknownClass> {
        u8::try_from(level).ok().filter(|level| usize::from(*level) < Class::COUNT).map(Class).ok_or(UnknownClass)
    }
}

impl std::str::FromStr for Class {
    type Err = UnknownClass;

    fn from_str(text: &str) -> Result<Self, UnknownClass> {
        let named = Class::NAMES.into_iter().find_map(|(name, class)| (name == text).then_some(class));
        named.map_or_else(|| text.parse::<u64>().map_err(|_| UnknownClass)?.try_into(), Ok)
    }
}

impl<'de> serde::Deserialize<'de> for Class {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Class;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("critical, high, normal, low, or a number from 0 to 7")
            }

            fn visit_u64<E: serde::de::Error>(self, level: u64) -> Result<Class, E> {
                Class::try_from(level).map_err(E::custom)
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Class, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_a_word_or_a_number() {
        let check = |json: &str, expect: Option<Class>| {
            assert_eq!(serde_json::from_str::<Class>(json).ok(), expect, "{json}");
        };
        check(r#""critical""#, Some(Class::CRITICAL));
        check(r#""low""#, Some(Class::LOW));
        check("5", Some(Class::HIGH));
        check("8", None);
        check("-1", None);
        check(r#""urgent""#, None);
        assert!(Class::all().eq(Class::all().map(|class| class.as_str().parse().expect("its own spelling"))));
    }
}

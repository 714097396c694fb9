//! `strftime` for chat templates that tell the model today's date: in UTC, and in English as Python's C locale.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Formats the current time.
pub(super) fn now(format: &str) -> Result<String, String> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    at(seconds, format)
}

/// Formats a time in seconds since 1970. Fails for a directive that is not known.
fn at(seconds: u64, format: &str) -> Result<String, String> {
    let days = seconds / 86_400;
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (hour_12, half) = ((hour + 11) % 12 + 1, if hour < 12 { "AM" } else { "PM" });
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[((days + 4) % 7) as usize]);
    let day_of_year = days - days_before_year(year) + 1;
    let mut text = String::with_capacity(format.len() * 2);
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let mut directive = characters.next();
        let padded = directive != Some('-');
        if !padded {
            directive = characters.next();
        }
        let number =
            |value: u64, width: usize| format!("{value:0>width$}", width = if padded { width } else { 1 });
        match directive {
            Some('Y') => write!(text, "{year}"),
            Some('y') => write!(text, "{}", number(year % 100, 2)),
            Some('m') => write!(text, "{}", number(month, 2)),
            Some('d') => write!(text, "{}", number(day, 2)),
            Some('e') => write!(text, "{day:>2}"),
            Some('j') => write!(text, "{}", number(day_of_year, 3)),
            Some('H') => write!(text, "{}", number(hour, 2)),
            Some('I') => write!(text, "{}", number(hour_12, 2)),
            Some('M') => write!(text, "{}", number(minute, 2)),
            Some('S') => write!(text, "{}", number(second, 2)),
            Some('p') => write!(text, "{half}"),
            Some('B') => write!(text, "{month_name}"),
            Some('b' | 'h') => write!(text, "{}", &month_name[..3]),
            Some('A') => write!(text, "{day_name}"),
            Some('a') => write!(text, "{}", &day_name[..3]),
            Some('F') => write!(text, "{year}-{month:02}-{day:02}"),
            Some('T') => write!(text, "{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => write!(text, "UTC"),
            Some('z') => write!(text, "+0000"),
            Some('%') => write!(text, "%"),
            Some(other) => return Err(format!("strftime_now: the directive %{other} is not supported")),
            None => return Err("strftime_now: the format ends with %".to_owned()),
        }
        .expect("writing to a String does not fail");
    }
    Ok(text)
}

/// Year, month and day of a day since 1970-01-01 in the Gregorian calendar (Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms", `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// Days from 1970-01-01 to the first of January of `year`.
fn days_before_year(year: u64) -> u64 {
    let before = year - 1;
    (before * 365 + before / 4 - before / 100 + before / 400) - 719_162
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_formatted_as_python_does() {
        let check = |seconds, format, expected: &str| assert_eq!(at(seconds, format).unwrap(), expected);
        check(0, "%d %b %Y", "01 Jan 1970");
        check(951_782_400, "%Y-%m-%d %A %j", "2000-02-29 Tuesday 060");
        check(1_735_689_599, "%B %-d, %Y %I:%M:%S %p", "December 31, 2024 11:59:59 PM");
        check(
            1_735_689_599,
            "%j %y %H %a %e %F %T %Z%z %%",
            "366 24 23 Tue 31 2024-12-31 23:59:59 UTC+0000 %",
        );
        check(1_772_323_200, "%d %h", "01 Mar");
    }

    #[test]
    fn unknown_directives_are_errors() {
        assert!(at(0, "%Q").unwrap_err().contains("%Q"));
        assert!(at(0, "100%").unwrap_err().contains("ends with %"));
    }
}

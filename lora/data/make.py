"""Writes `train.jsonl`, `valid.jsonl` and `test.jsonl` beside this script: notes about expenses, and the same as JSON.

    python lora/data/make.py

All content is invented, and the files are always the same. Each shop is in only one of the files, and some sentence
patterns are only in `test.jsonl`, so the test does not measure memorization.
"""

from __future__ import annotations

import json
import random
from datetime import date, timedelta
from pathlib import Path

SIZES = {"train": 320, "valid": 40, "test": 40}
SEED = 7

# What was bought and where, by category.
ITEMS = {
    "food": "lunch|a team dinner|coffee and croissants|sandwiches|a fruit basket|breakfast|pizza for the crew|"
    "two salads|snacks for the meeting|a birthday cake|groceries|soup and bread",
    "transport": "a taxi to the airport|train tickets|a bus pass|parking|fuel|a bike rental|a metro card|"
    "a ferry ticket|road tolls|a ride home|new tyres|a tram day ticket",
    "office": "printer paper|two toner cartridges|a desk lamp|notebooks|a whiteboard|staples and tape|"
    "an office chair|envelopes|a box of pens|a label maker|a filing cabinet|sticky notes",
    "travel": "a night in a single room|three nights in a double room|a flight|a hotel room|travel insurance|"
    "a visa fee|luggage storage|an airport lounge|a holiday flat|a late checkout|a seat upgrade|a city tour",
    "software": "a code editor licence|cloud storage|a domain name|a password manager|a design tool|web hosting|"
    "an antivirus renewal|a spreadsheet plug-in|a video call plan|a backup service|a font licence|a mail service",
    "utilities": "electricity|the water bill|internet access|a phone plan|heating oil|waste collection|gas|"
    "mobile data|a router rental|the sewage fee|a landline|district heating",
}
SHOPS = {
    "food": "Cafe Luna|The Copper Pot|Bakery Holm|Noodle Corner|Green Fork|Mill Street Deli|Casa Verde|Old Harbour Inn|"
    "Rosa's Kitchen|The Quiet Bean|Market Hall 4|Pepper and Plum|Olive Yard|Blue Door Bistro",
    "transport": "Swift Cabs|Northern Rail|City Parking|Harbour Ferries|Pedal Point|Metro Link|Fuel Stop 12|"
    "Ring Road Garage|Green Tram|Airport Shuttle Co|Wheel House|Coast Line Buses|Blue Cab|Highway East",
    "office": "Paper Lane|Desk and Co|The Ink Shop|Stationers Hall|Office Barn|Penwright|Board and Chalk|Folder Town|"
    "Hansen Supplies|Quill House|Workroom Direct|Lamp and Lever|Box Nine|Tidy Desk",
    "travel": "Hotel Meridian|Seaview Lodge|Skyway Air|Pine Hill Hostel|Grand Central Rooms|Wander Travel|Alpine Stays|"
    "Station Lockers|Lakeside Inn|Blue Heron Hotel|Cloud Nine Flights|Old Town Rooms|Trailhead Tours|Compass Cover",
    "software": "Codeworks|Bitbarn|Nimbus Store|Keyring Labs|Pixelry|Hostwell|Shieldsoft|Gridmate|Callroom|Vaultup|"
    "Typehouse|Mailcraft|Stackyard|Domainia",
    "utilities": "Bright Power|Clearwater Works|Fibre First|Telora|Warmhome Oil|City Waste|Northgas|Mobilo|Netbox|"
    "Riverside Water|Sunfield Energy|Linetel|Heatworks|Green Current",
}
# The first shops of each category are for `train`; the others are divided equally between `valid` and `test`.
TRAIN_SHOPS = 10

WORDINGS = [
    "Paid {amount} at {shop} for {item} on {date}.",
    "{date}: {item} from {shop}, {amount}.",
    "Bought {item} at {shop} on {date}, {amount} in total.",
    "{shop} charged me {amount} for {item} ({date}).",
    "Spent {amount} on {item}, {shop}, {date}.",
    "Receipt from {shop} dated {date}: {item}, {amount}.",
    "On {date} I got {item} at {shop}. It came to {amount}.",
    "Please reimburse {amount} for {item}; {shop}, {date}.",
    "Invoice {number} of {date} from {shop}: {item}, {amount} due.",
    "My card was charged {amount} by {shop} on {date} for {item}.",
    "We paid {shop} {amount} on {date}: {item}.",
    "{amount} to {shop}, {date}, {item}.",
    "Got {item} from {shop}, {date}, {amount}.",
    "Expense report: {date}, {shop}, {item}, total {amount}.",
    "There is a bill of {amount} from {shop} for {item}, {date}.",
    "Ordered {item} from {shop} on {date} and paid {amount}.",
    "Tax is included in the {amount} that {shop} asked for {item} on {date}.",
    "Lost the receipt, but {item} at {shop} was {amount} on {date}.",
    "Order {number}, {date}: {item} by {shop} for {amount}.",
    "Could you book {amount} for {item}? {shop}, {date}.",
    "{shop}, {date}: {amount} for {item}.",
    "For {item} I gave {shop} {amount}, {date}.",
    "The bill of {date} says {amount}, {shop}, {item}.",
    "Cash, {amount}, {item}, {shop}, {date}.",
]
UNSEEN_WORDINGS = [
    "It was {item} this time: {shop} on {date}, and {amount} are gone.",
    "Reimbursement request. Where: {shop}. When: {date}. What: {item}. How much: {amount}.",
    "{date}, {amount}. That was {item}, bought from {shop}.",
    "I still have to hand in {shop}, {item}, {amount}, from {date}.",
]

# How people write an amount of a currency.
AMOUNTS = {
    "USD": ("${}", "{} dollars", "USD {}", "{} USD"),
    "EUR": ("€{}", "{} euros", "EUR {}", "{} EUR"),
    "GBP": ("£{}", "{} pounds", "GBP {}", "{} GBP"),
    "CHF": ("CHF {}", "{} francs", "{} CHF"),
}
MONTHS = ("January", "February", "March", "April", "May", "June")
MONTHS += ("July", "August", "September", "October", "November", "December")


def write_date(day: date, rng: random.Random) -> str:
    """A date in one of the ways that people write it, none of them ambiguous."""
    month = MONTHS[day.month - 1]
    suffix = "th" if 11 <= day.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return rng.choice(
        [
            day.isoformat(),
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{month[:3]} {day.day} {day.year}",
            f"{day.day:02} {month[:3]} {day.year}",
            f"the {day.day}{suffix} of {month} {day.year}",
        ]
    )


def make_example(split: str, rng: random.Random) -> dict[str, str]:
    """A note and its JSON, as `prompt` and `completion`."""
    category = rng.choice(list(ITEMS))
    shops = SHOPS[category].split("|")
    others = shops[TRAIN_SHOPS:]
    shop = rng.choice({"train": shops[:TRAIN_SHOPS], "valid": others[::2], "test": others[1::2]}[split])
    currency = rng.choice(list(AMOUNTS))
    cents = rng.randrange(200, rng.choice([2_000, 8_000, 30_000, 90_000]))  # small amounts are more frequent
    amount = f"{cents / 100:.2f}"
    if rng.random() < 0.25:  # a round amount, written without cents
        amount = f"{cents // 100}.00"
    day = date(2023, 1, 1) + timedelta(days=rng.randrange(3 * 365))
    wordings = WORDINGS + UNSEEN_WORDINGS * 3 if split == "test" else WORDINGS
    note = rng.choice(wordings).format(
        amount=rng.choice(AMOUNTS[currency]).format(amount.removesuffix(".00")),
        shop=shop,
        item=rng.choice(ITEMS[category].split("|")),
        date=write_date(day, rng),
        number=rng.randrange(1000, 10_000),
    )
    answer = (
        f'{{"date": "{day.isoformat()}", "shop": {json.dumps(shop)}, "amount": {amount}, '
        f'"currency": "{currency}", "category": "{category}"}}'
    )
    return {"prompt": f"Note: {note[0].upper()}{note[1:]} JSON:", "completion": f" {answer}"}


def main() -> None:
    """Write the three files."""
    rng = random.Random(SEED)
    seen: set[str] = set()
    for split, size in SIZES.items():
        examples: list[dict[str, str]] = []
        while len(examples) < size:
            example = make_example(split, rng)
            if example["prompt"] not in seen:
                seen.add(example["prompt"])
                examples.append(example)
        lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        (Path(__file__).parent / f"{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()

//! A picture of the screen, and what can be found on it.
use super::wire::Rectangle;
use anyhow::{Context, Result};
use camino::Utf8Path;
use std::collections::BTreeMap;

/// How far each channel may be off: a browser's colour management rounds.
const TOLERANCE: u8 = 3;

/// A picture, 8 bits each of red, green and blue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

/// Where a colour is: the box around all its pixels, and how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    pub left: u16,
    pub top: u16,
    pub right: u16,
    pub bottom: u16,
    pub pixels: usize,
}

impl Area {
    /// The middle of the box.
    pub fn middle(&self) -> (u16, u16) {
        (
            self.left.midpoint(self.right),
            self.top.midpoint(self.bottom),
        )
    }
}

fn index(value: usize) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

impl Frame {
    /// A black picture.
    pub fn new(width: u16, height: u16) -> Self {
        let (width, height) = (usize::from(width), usize::from(height));
        Self {
            width,
            height,
            rgb: vec![0; width * height * 3],
        }
    }

    /// Width and height in pixels.
    pub fn size(&self) -> (u16, u16) {
        (index(self.width), index(self.height))
    }

    /// The colour at a place; black outside the picture.
    pub fn pixel(&self, x: u16, y: u16) -> [u8; 3] {
        let (x, y) = (usize::from(x), usize::from(y));
        let at = (y * self.width + x) * 3;
        match self.rgb.get(at..at + 3) {
            Some(&[r, g, b]) if x < self.width => [r, g, b],
            Some(_) | None => [0; 3],
        }
    }

    fn pixels(&self) -> impl Iterator<Item = [u8; 3]> {
        self.rgb.as_chunks::<3>().0.iter().copied()
    }

    /// Where this colour is, if anywhere.
    pub fn area(&self, rgb: [u8; 3]) -> Option<Area> {
        let near = |pixel: [u8; 3]| {
            pixel
                .iter()
                .zip(rgb)
                .all(|(a, b)| a.abs_diff(b) <= TOLERANCE)
        };
        let mut found: Option<Area> = None;
        for (at, _) in self.pixels().enumerate().filter(|(_, pixel)| near(*pixel)) {
            let (x, y) = (index(at % self.width), index(at / self.width));
            let area = found.get_or_insert(Area {
                left: x,
                top: y,
                right: x,
                bottom: y,
                pixels: 0,
            });
            area.left = area.left.min(x);
            area.right = area.right.max(x);
            area.bottom = y;
            area.pixels += 1;
        }
        found
    }

    /// The colour of most pixels, and its share in per cent.
    pub fn commonest(&self) -> ([u8; 3], usize) {
        let mut counts: BTreeMap<[u8; 3], usize> = BTreeMap::new();
        for pixel in self.pixels() {
            *counts.entry(pixel).or_default() += 1;
        }
        let total = (self.width * self.height).max(1);
        counts
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .map_or(([0; 3], 0), |(rgb, count)| (rgb, count * 100 / total))
    }

    /// Writes the picture as a PNG file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Utf8Path) -> Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).with_context(|| format!("make `{dir}`"))?;
        }
        let file = std::fs::File::create(path).with_context(|| format!("create `{path}`"))?;
        let (width, height) = self.size();
        let mut encoder =
            png::Encoder::new(std::io::BufWriter::new(file), width.into(), height.into());
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder
            .write_header()
            .with_context(|| format!("begin `{path}`"))?;
        writer
            .write_image_data(&self.rgb)
            .with_context(|| format!("write `{path}`"))
    }

    pub(super) fn apply(&mut self, rectangle: Rectangle) {
        match rectangle {
            Rectangle::Pixels {
                x,
                y,
                width,
                height,
                bgrx,
            } => {
                let row = usize::from(width) * 4;
                for (line, bytes) in bgrx
                    .chunks_exact(row.max(1))
                    .take(height.into())
                    .enumerate()
                {
                    for (column, pixel) in bytes.chunks_exact(4).enumerate() {
                        let rgb = [pixel[2], pixel[1], pixel[0]];
                        self.set(usize::from(x) + column, usize::from(y) + line, rgb);
                    }
                }
            }
            Rectangle::Copy {
                x,
                y,
                width,
                height,
                from_x,
                from_y,
            } => {
                let before = self.clone();
                for line in 0..height {
                    for column in 0..width {
                        let rgb = before
                            .pixel(from_x.saturating_add(column), from_y.saturating_add(line));
                        self.set(
                            usize::from(x) + usize::from(column),
                            usize::from(y) + usize::from(line),
                            rgb,
                        );
                    }
                }
            }
            Rectangle::Size { width, height } if self.size() != (width, height) => {
                *self = Self::new(width, height);
            }
            Rectangle::Size { .. } | Rectangle::Last => {}
        }
    }

    fn set(&mut self, x: usize, y: usize, rgb: [u8; 3]) {
        if x < self.width && y < self.height {
            let at = (y * self.width + x) * 3;
            self.rgb[at..at + 3].copy_from_slice(&rgb);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rectangles_land_where_they_belong() {
        let mut frame = Frame::new(8, 4);
        let red = [0, 0, 255, 0].repeat(4);
        frame.apply(Rectangle::Pixels {
            x: 1,
            y: 1,
            width: 2,
            height: 2,
            bgrx: red,
        });
        frame.apply(Rectangle::Copy {
            x: 5,
            y: 2,
            width: 2,
            height: 2,
            from_x: 1,
            from_y: 1,
        });
        let area = frame.area([255, 0, 0]).unwrap();
        assert_eq!(
            (area.left, area.top, area.right, area.bottom, area.pixels),
            (1, 1, 6, 3, 8)
        );
        assert_eq!(frame.pixel(6, 3), [255, 0, 0]);
        assert_eq!(frame.commonest(), ([0, 0, 0], 75));
        frame.apply(Rectangle::Pixels {
            x: 7,
            y: 3,
            width: 9,
            height: 9,
            bgrx: vec![9; 9 * 9 * 4],
        });
        frame.apply(Rectangle::Size {
            width: 3,
            height: 2,
        });
        assert_eq!((frame.size(), frame.area([255, 0, 0])), ((3, 2), None));
    }
}
